"""One run a folder, whoever is killed, suspended or on another host."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from train import lock
from train.lock import Lock, LockLostError, Owner

ELSEWHERE = Owner("far", 7, "2026-01-01 00:00:00 UTC", "99", "another boot", 1)


def write(folder, number, owner, age=0.0):
    path = folder / f"lock.{number}"
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def short(folder, **fields):
    return Lock(folder, "output='x'", **{"lease": 0.6, "beat": 0.1, **fields})


def test_a_live_owner_is_named_at_once(tmp_path):
    with Lock(tmp_path, "output='x'"):
        began = time.monotonic()
        message = rf"output='x': another run is at work there \(host .*, pid {os.getpid()}, since"
        with pytest.raises(ValueError, match=message), Lock(tmp_path, "output='x'"):
            pass
        assert time.monotonic() - began < 1


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "notes").write_text("")
    with pytest.raises(ValueError, match=r"output='runs' cannot be made a folder .*; choose"):
        Lock(tmp_path / "notes", "output='runs'").__enter__()


def test_a_killed_owner_of_this_host_costs_no_wait(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from train.lock import Lock\n"
        "Lock(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its number is still there
    assert (tmp_path / "lock.1").exists()
    began = time.monotonic()
    with Lock(tmp_path):
        assert time.monotonic() - began < 1
        assert [p.name for p in tmp_path.iterdir()] == ["lock.2"]
    killed.wait()


def test_a_process_number_that_came_again_is_not_the_owner(tmp_path):
    me = Owner.me()
    assert me.started is not None
    assert me.started > (lock._started(1) or 0)  # processes of one boot tell their age
    write(tmp_path, 3, dataclasses.replace(me, started=me.started - 1))
    with short(tmp_path):
        assert (tmp_path / "lock.4").exists()


def test_a_released_lock_is_free_and_numbers_grow(tmp_path):
    for number in (1, 2, 3):
        with short(tmp_path):
            assert [p.name for p in tmp_path.iterdir()] == [f"lock.{number}"]


def test_another_hosts_lock_is_stale_after_the_lease(tmp_path):
    write(tmp_path, 1, ELSEWHERE, age=5)
    said = []
    with short(tmp_path, tell=said.append):
        assert not said
    write(tmp_path, 8, ELSEWHERE)
    began = time.monotonic()
    with short(tmp_path, tell=said.append):
        assert 0.4 < time.monotonic() - began < 3
    assert "in use by another run (host far, pid 7, job 99, since 2026" in said[0]


def test_another_hosts_touch_refuses(tmp_path):
    path = write(tmp_path, 1, ELSEWHERE)
    timer = threading.Timer(0.3, os.utime, [path])
    timer.start()
    with pytest.raises(ValueError, match=r"at work there.*host far"), short(tmp_path):
        pass
    timer.join()


def test_clocks_of_hosts_are_not_compared(tmp_path, monkeypatch):
    """This host an hour ahead of the file server: the lock is as young as it is."""
    write(tmp_path, 1, ELSEWHERE)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    said = []
    with short(tmp_path, tell=said.append):
        assert said


def test_one_of_two_takes_a_stale_lock(tmp_path):
    """The slower one has judged it stale too, and finds the next number taken, or outbid."""
    write(tmp_path, 1, ELSEWHERE, age=5)
    with short(tmp_path):
        slow = short(tmp_path)
        assert not slow._take(2)
        (tmp_path / "lock.1").unlink(missing_ok=True)
        assert not slow._take(1)
        assert [p.name for p in tmp_path.iterdir()] == ["lock.2"]


def test_an_owner_that_was_outbid_must_not_write(tmp_path):
    with short(tmp_path) as held:
        held.check()
        write(tmp_path, 2, ELSEWHERE)
        with pytest.raises(LockLostError, match=r"taken over by another run \(host far"):
            held.check()


def test_an_owner_that_slept_past_its_lease_must_not_write(tmp_path, monkeypatch):
    with short(tmp_path) as held:
        held._stop.set()
        held._thread.join()
        held.check()
        clock = lock._clock
        monkeypatch.setattr(lock, "_clock", lambda: clock() + 1)
        with pytest.raises(LockLostError, match="could not be touched for 1 s"):
            held.check()


def test_touches_keep_it(tmp_path):
    with short(tmp_path) as held:
        time.sleep(1.0)
        held.check()
        assert held._age(1)[0] < 0.6
