"""Work ahead of time is finished, work of work included; and the stopwatch of the demo."""

import sys
import threading
import time

from train import laps
from train.ahead import Ahead


def test_waiting_covers_what_the_work_itself_submits():
    done = []
    go = threading.Event()

    with Ahead() as ahead:

        def outer():
            go.wait(10)
            ahead.submit(inner)

        def inner():
            time.sleep(0.05)
            done.append("inner")

        ahead.submit(outer)
        go.set()
        ahead.wait()
        assert done == ["inner"]


def test_what_fails_ahead_is_told_to_who_asks_for_it_alone():
    def fail():
        raise ValueError("too early")

    with Ahead() as ahead:
        work = ahead.submit(fail)
        ahead.wait()
    assert str(work.exception()) == "too early"


def test_who_trains_gets_the_interpreter_soon_and_later_work_as_before():
    before = sys.getswitchinterval()
    with Ahead():
        assert sys.getswitchinterval() < 1e-3 <= before
    assert sys.getswitchinterval() == before


def test_laps_add_up_by_name(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 9.0])
    monkeypatch.setattr(laps.time, "perf_counter", lambda: next(now))
    clock = laps.Laps()
    clock.end("dense")
    clock.end("evaluation")
    clock.end("dense")
    assert clock.seconds == {"dense": 5.0, "evaluation": 2.0}
    assert clock.total == 9.0
