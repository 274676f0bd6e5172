"""A generation in a thread of its own, told to a reader as updates.

    work(run) in its thread ── run.show(...) ──► the newest Update ──► `for update in updates_of(work, ...)`
         ▲                                                                  │
         └──────────────────── run.should_stop() ◄──────────────────────────┘  closed, stopped, too late, unread

The reader gets the newest state only, so that a slow one never holds the model up. Whoever closes the iterator does
not wait for the thread: gradio does that in its event loop.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .errors import explain
from .updates import Update

#: Seconds between two updates at least, and at most.
_RATE, _HEARTBEAT = 0.15, 0.5
#: What is made to be looked at in between may take this share of a generation's time.
_SHARE = 0.2


class Run:
    """One generation, as its thread sees it.

    Args:
        seed (`int`).
        stopped (`threading.Event`): whether somebody wants it to end.
        max_seconds (`float`): it may take.
        patience (`float`): seconds after which it ends because nobody reads it.

    Attributes:
        reason (`str`): why it was told to stop; empty if it was not.
    """

    def __init__(self, seed: int, stopped: threading.Event, max_seconds: float, patience: float):
        self.seed = seed
        self._stopped, self._max_seconds, self._patience = stopped, max_seconds, patience
        self._changed = threading.Condition()
        self._closed = False
        self._started = self._read = time.monotonic()
        self._aside = self._shown = 0.0
        self._update = Update(stage="prompt", message="Reading the request.", seed=seed)
        self._version = 0
        self.reason = ""

    # --- the thread's side ---

    @property
    def seconds(self) -> float:
        """Since it began, without the previews."""
        return time.monotonic() - self._started - self._aside

    def show(self, **changes: Any):
        """Changes fields of the [`Update`].  With a `fraction` comes an estimate of the time that remains."""
        seconds = self.seconds
        if changes.get("fraction"):
            changes.setdefault("remaining", seconds * (1 - changes["fraction"]) / changes["fraction"])
        with self._changed:
            self._update = replace(self._update, seconds=seconds, **changes)
            self._version += 1
            self._changed.notify_all()

    def restart(self):
        """Starts the clock anew."""
        self._started = time.monotonic()

    def count_pass(self, *_: Any):
        """A forward hook."""
        with self._changed:
            self._update = replace(self._update, passes=self._update.passes + 1)

    def show_sometimes(self, changes: Callable[[], dict[str, Any]], force: bool = False):
        """[`show`] of changes that take time to make, such as previews; so seldom that they don't take much of it."""
        began = time.monotonic()
        too_soon = began - self._shown < _RATE or self._aside > _SHARE * max(began - self._started, _RATE)
        if too_soon and not force:
            return
        made = changes()
        self._shown = time.monotonic()
        self._aside += self._shown - began
        self.show(**made)

    def stop(self, reason: str):
        """Ends the generation, with a sentence that says why."""
        self.reason = self.reason or reason

    def should_stop(self) -> bool:
        """Whether to end; once it is true it stays so."""
        now = time.monotonic()
        if self.reason:
            return True
        if self._stopped.is_set() or self._closed:
            self.reason = "Stopped."
        elif now - self._started > self._max_seconds:
            self.reason = f"Stopped: the time limit of {self._max_seconds:g} seconds."
        elif now - self._read > self._patience:
            self.reason = "Stopped: nobody was waiting for it any more."
        return bool(self.reason)

    # --- the reader's side ---

    def updates(self) -> Iterator[Update]:
        """The states from now on, up to the last."""
        version, sent, update = -1, 0.0, None
        try:
            while update is None or not update.is_last:  # the last one, too, if the thread was faster
                with self._changed:
                    self._read = time.monotonic()
                    self._changed.wait_for(lambda seen=version: self._version != seen, _HEARTBEAT)
                    self._changed.wait_for(lambda: self._update.is_last, max(0.0, sent + _RATE - time.monotonic()))
                    version, update = self._version, self._update
                sent = time.monotonic()
                yield update if update.is_last else self._as_of_now(update)
        finally:
            self._closed = True

    def _as_of_now(self, update: Update) -> Update:
        seconds = max(self.seconds, update.seconds)
        if update.remaining is None:
            return replace(update, seconds=seconds)
        return replace(update, seconds=seconds, remaining=max(0.0, update.remaining - (seconds - update.seconds)))


def updates_of(work: Callable[[Run], None], run: Run, on_end: Callable[[], None]) -> Iterator[Update]:
    """Starts `work(run)` in a thread at once, and tells what it shows.

    Args:
        work: ends early where `run.should_stop()` says so.
        on_end: called in the thread when it has ended, however that came about.
    """

    def target():
        try:
            work(run)
            run.show(
                stage="stopped" if run.reason else "done",
                message=run.reason or "Done.",
                remaining=None,
                **({} if run.reason else {"fraction": 1.0}),
            )
        except Exception as error:  # a thread has nobody to raise it to: the reader is told
            run.show(stage="error", message=explain(error), remaining=None)
        finally:
            on_end()

    threading.Thread(target=target, name="generation", daemon=True).start()
    return run.updates()


__all__ = ["Run", "updates_of"]
