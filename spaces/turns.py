"""Whose turn it is: one request at a time uses the model.

Visitors share the model fairly, by their network address: start-time fair queueing. Each request gets a number, the
one in service or one more than the last of its address, whichever is higher; the lowest is served first, of equals the
older. So a lone request passes the tenth of somebody else's; where all come from one address (behind a proxy), they
are served as they came. A visitor (a browser tab) may have a few requests waiting or running, an address half of the
queue. A request that its reader has left (a closed page) loses its place.
"""

import threading
import time
from dataclasses import dataclass

from .errors import UserError

#: Seconds between two looks at the queue while waiting.
NAP = 2.0


@dataclass(frozen=True)
class Visitor:
    """Who sends a request: a session of a browser, or of a client, and its network address.

    A session is one visitor, whatever its address: proxies change those between requests. The address is for shares.
    """

    session: str = ""
    address: str = ""


class Turn:
    """A place in the queue, then the model itself.

    Attributes:
        user ([`Visitor`]).
        stopped (`threading.Event`): whether somebody wants it to end.
    """

    def __init__(self, queue: "TurnQueue", user: Visitor, rank: tuple[float, int]):
        self._queue, self.user, self._rank = queue, user, rank
        self.stopped = threading.Event()
        self._seen = time.monotonic()
        self._holds = 1

    def wait(self, seconds: float = NAP) -> bool:
        """Waits a moment; returns whether it is this one's turn.  Whoever waits must call it again and again.

        Raises:
            UserError: if it has lost its place.
        """
        queue = self._queue
        with queue._changed:
            self._seen = time.monotonic()
            if not queue._is_next(self) and not self.stopped.is_set():
                queue._changed.wait(min(seconds, queue.patience / 3))
            self._seen = time.monotonic()
            if self not in queue._turns:
                raise UserError("This request has lost its place in the queue. Please send it again.")
            if not queue._is_next(self) or self.stopped.is_set():
                return False
            queue._running = self
            # Time goes on by itself, too, or newcomers would pass those who wait for ever.
            queue._now = max(queue._now + 1 / queue.size, self._rank[0])
            return True

    @property
    def num_before(self) -> int:
        """Requests that come first, the running one included."""
        queue = self._queue
        with queue._changed:
            return sum(turn is queue._running or turn._rank < self._rank for turn in queue._turns if turn is not self)

    def stop(self):
        """Asks for its end."""
        with self._queue._changed:
            self.stopped.set()
            self._queue._changed.notify_all()

    def touch(self):
        """Whoever has it is still there."""
        self._seen = time.monotonic()

    def hold(self):
        """Another one uses the model on this turn, and will release it, too."""
        with self._queue._changed:
            self._holds += 1

    def release(self):
        """Gives the place, or the model, to the next when the last that holds it does so."""
        queue = self._queue
        with queue._changed:
            self._holds -= 1
            if self._holds:
                return
            if queue._running is self:
                queue._running = None
            queue._turns.discard(self)
            queue._changed.notify_all()


class TurnQueue:
    """A fair queue with a bounded length and bounded shares.

    Args:
        size (`int`): requests that may wait.
        per_user (`int`): requests of one visitor that may wait or run.
        patience (`float`): seconds after which a waiting request that nobody asks for is dropped.
    """

    def __init__(self, size: int, per_user: int, patience: float):
        self.size, self.per_user, self.patience = size, per_user, patience
        self._changed = threading.Condition()
        self._turns: set[Turn] = set()
        self._running: Turn | None = None
        self._now = 0.0
        self._next_numbers: dict[str, float] = {}  # by address
        self._num_joined = 0

    def __len__(self) -> int:
        """Requests that wait."""
        with self._changed:
            return len(self._turns) - (self._running is not None)

    @property
    def is_busy(self) -> bool:
        """Whether the model is in use."""
        with self._changed:
            self._drop_abandoned()
            return self._running is not None

    def join(self, user: Visitor) -> Turn:
        """A place in the queue.

        Raises:
            UserError: if the queue is full, or the visitor has enough in it.
        """
        with self._changed:
            self._drop_abandoned()
            own = sum(turn.user.session == user.session for turn in self._turns)
            if own >= self.per_user:
                raise UserError(
                    f"You have {own} requests in the queue, and there is room for {self.per_user} of each visitor. "
                    "Wait for one to end, or stop it."
                )
            same_address = sum(turn.user.address == user.address for turn in self._turns)
            if len(self) >= self.size or same_address >= max(self.per_user, self.size // 2):
                raise UserError(f"{len(self)} requests are waiting, which is as many as may. Try again in a minute.")
            number = max(self._now, self._next_numbers.get(user.address, 0.0))
            self._next_numbers = {key: one for key, one in self._next_numbers.items() if one > self._now}
            self._next_numbers[user.address] = number + 1
            self._num_joined += 1
            turn = Turn(self, user, (number, self._num_joined))
            self._turns.add(turn)
            return turn

    def stop(self, user: Visitor):
        """Asks for the end of all that the visitor has waiting or running."""
        with self._changed:
            for turn in self._turns:
                if turn.user.session == user.session:
                    turn.stop()

    def _is_next(self, turn: Turn) -> bool:
        self._drop_abandoned()
        return self._running is None and turn is min(self._turns, key=lambda one: one._rank, default=None)

    def _drop_abandoned(self):
        late = time.monotonic() - self.patience
        # While a second one holds it, the model is at work.
        self._turns = {one for one in self._turns if one._seen >= late or one._holds > 1}
        if self._running not in self._turns:
            self._running = None


__all__ = ["NAP", "Turn", "TurnQueue", "Visitor"]
