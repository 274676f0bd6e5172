"""The fair queue in front of the model."""

import threading
import time

import pytest
from emu35.spaces.errors import UserError
from emu35.spaces.turns import TurnQueue, Visitor


def served(queue, turns):
    """Names of the turns, in the order in which they get the model."""
    waiting, order = dict(turns), []
    while waiting:
        name = next(name for name, turn in waiting.items() if turn.wait(0))
        order.append(name)
        waiting.pop(name).release()
    return order


def test_one_address_is_served_as_it_comes():
    queue = TurnQueue(20, 2, 60)
    turns = {name: queue.join(Visitor(str(name), "proxy")) for name in range(8)}
    assert [turn.num_before for turn in turns.values()] == list(range(8))
    assert served(queue, turns) == list(range(8))


def test_addresses_share_the_model():
    queue = TurnQueue(20, 20, 60)
    turns = {f"a{number}": queue.join(Visitor("a", "1.1.1.1")) for number in range(4)}
    turns["b0"] = queue.join(Visitor("b", "2.2.2.2"))
    turns["c0"] = queue.join(Visitor("c", "3.3.3.3"))
    turns["b1"] = queue.join(Visitor("b", "2.2.2.2"))
    assert turns["b0"].num_before == 1
    assert served(queue, turns) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_newcomers_do_not_starve_those_who_wait():
    queue = TurnQueue(6, 6, 60)
    patient = [queue.join(Visitor("a", "1.1.1.1")) for _ in range(3)]
    waiting = list(patient)
    for number in range(20):  # a new address before every turn
        waiting.append(queue.join(Visitor(f"n{number}", f"9.9.9.{number}")))
        served = next(turn for turn in waiting if turn.wait(0))
        served.release()
        waiting.remove(served)
    assert not set(patient) & set(waiting)


def test_the_model_of_somebody_who_has_gone_is_taken_back():
    queue = TurnQueue(4, 4, patience=0.05)
    gone = queue.join(Visitor("gone"))
    assert gone.wait(0)
    gone.hold()
    time.sleep(0.1)
    assert queue.is_busy  # at work
    gone.release()
    assert not queue.is_busy
    gone.release()
    here = queue.join(Visitor("here"))
    assert here.wait(0)


def test_shares_are_bounded():
    queue = TurnQueue(size=8, per_user=2, patience=60)
    for _ in range(2):
        queue.join(Visitor("a", "1.1.1.1"))
    with pytest.raises(UserError, match="You have 2 requests"):
        queue.join(Visitor("a", "1.1.1.1"))
    for session in "bc":
        queue.join(Visitor(session, "1.1.1.1"))
    with pytest.raises(UserError, match="Try again in a minute"):  # half of the queue is theirs
        queue.join(Visitor("d", "1.1.1.1"))
    for number in range(4):
        queue.join(Visitor(f"e{number}", str(number)))
    with pytest.raises(UserError, match="8 requests are waiting"):
        queue.join(Visitor("f", "f"))
    assert len(queue) == 8


def test_a_visitor_is_a_session_whatever_its_address():
    """A proxy's address may change between two requests of a page."""
    queue = TurnQueue(size=8, per_user=2, patience=60)
    mine = [queue.join(Visitor("a", address)) for address in ("1.1.1.1", "2.2.2.2")]
    with pytest.raises(UserError, match="You have 2 requests"):
        queue.join(Visitor("a", "3.3.3.3"))
    other = queue.join(Visitor("b", "1.1.1.1"))
    queue.stop(Visitor("a", "3.3.3.3"))
    assert all(turn.stopped.is_set() for turn in mine)
    assert not other.stopped.is_set()


def test_a_place_that_nobody_asks_for_is_dropped():
    queue = TurnQueue(4, 4, patience=0.05)
    gone, here = queue.join(Visitor("gone")), queue.join(Visitor("here"))
    assert not here.wait(0)
    time.sleep(0.1)
    assert len(queue) == 2
    queue.join(Visitor("new"))
    with pytest.raises(UserError, match="lost its place"):
        gone.wait(0)


def test_the_model_is_free_when_all_that_hold_it_have_let_go():
    queue = TurnQueue(4, 4, 60)
    first, second = queue.join(Visitor("a")), queue.join(Visitor("b"))
    assert first.wait(0)
    first.hold()
    first.release()
    assert not second.wait(0)
    assert queue.is_busy
    first.release()
    assert second.wait(0)


def test_waiting_ends_when_the_model_becomes_free():
    queue = TurnQueue(4, 4, 60)
    first, second = queue.join(Visitor("a")), queue.join(Visitor("b"))
    assert first.wait(0)
    threading.Timer(0.1, first.release).start()
    began = time.monotonic()
    assert second.wait(30)
    assert time.monotonic() - began < 10
