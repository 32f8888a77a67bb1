"""A parent that outlives a process of a run and says in a sentence how it ended.

When a process of a run is lost, JAX aborts the others from within its runtime, also where Python
stands still in a collective; the same happens when some never start. No Python code runs in a
process that aborts, so it is its parent that explains, and ends with a status that a job script can
read.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable

INTERRUPTED = 75
"""Exit status: saved and stopped on request (EX_TEMPFAIL): start it again to go on."""

LOST = 76
"""Exit status: another process of the run was lost, or never came; start all again."""

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


class Worker:
    """The worker's end of the pipe to its parent."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def joined(self) -> None:
        """Says that all processes of the run have come together."""
        os.write(self._descriptor, b"joined")


def supervise(name: str, start_timeout: int, work: Callable[[Worker], int]) -> int:
    """Runs `work` in a forked process, passes signals on to it, and explains its end.

    To be called before a JAX backend starts: its threads would not survive the fork.

    Args:
        name: of the process in its run, for messages.
        start_timeout: seconds it may wait for the others, for messages.
        work: returns the exit status.

    Returns:
        Its status; `LOST` if the runtime aborted it; 128 + number for another signal.
    """
    ours, theirs = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    # Held back until both can handle them.
    unheld = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    child = _fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, unheld)
        os.close(ours)
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent, which passes it on: once
        _die_with(parent)
        os._exit(_guarded(work, Worker(theirs)))
    os.close(theirs)
    for number in _PASSED_ON:
        signal.signal(number, lambda received, frame: _pass_on(child, received))
    signal.pthread_sigmask(signal.SIG_SETMASK, unheld)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    joined = bool(os.read(ours, 16))
    text, code = _explain(-code, joined, start_timeout)
    print(f"error: {name} on {socket.gethostname()} (pid {child}) {text}", file=sys.stderr)
    return code


def _fork() -> int:
    with warnings.catch_warnings():
        # Python warns of threads; here they are idle ones of NumPy, which knows how to fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _guarded(work: Callable[[Worker], int], worker: Worker) -> int:
    """Runs the work; what comes out of it is a status, for the stack above is the parent's."""
    try:
        code = work(worker)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    # Not through Python's own end, which would wait for the others: if this process fails, they
    # must learn it now. The work has closed what it opened.
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _die_with(parent: int) -> None:
    """A kill of the parent is one of the worker; else it would go on, unseen by the launcher."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _pass_on(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _explain(number: int, joined: bool, start_timeout: int) -> tuple[str, int]:
    if number == signal.SIGABRT and not joined:
        return (
            f"ended: the processes of the run did not all come together within {start_timeout} s "
            "(--cluster.start-timeout). See that all are started, that they reach the "
            "coordinator's address and port, and that no proxy variable is in the way",
            LOST,
        )
    if number == signal.SIGABRT:
        return (
            "ended because another process of the run is lost (the lines above say which, its own "
            "log says why). The checkpoints are whole: start all processes again to go on",
            LOST,
        )
    if number == signal.SIGKILL:
        return "was killed (signal 9), which is what the system does when memory runs out", 137
    return f"was ended by {signal.Signals(number).name}", 128 + number
