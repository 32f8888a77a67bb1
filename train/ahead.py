"""Work for other cores while the device trains: compiling what comes next."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# Enough that one holds the interpreter, to trace, while the others' compilers work without it.
_THREADS = 4
# Seconds until a thread that computes hands the interpreter over. The training loop lets go of it
# several times a step and would each time wait for all of the threads: with Python's 5 ms, a step
# of 13 ms takes 100.
_SWITCH = 2e-4


class Ahead:
    """A pool of threads that know what their creator knows (`dispatch.kernels`, for one)."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS)
        self._work: list[Future] = []
        self._switch = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Calls the function, some time soon; those submitted first begin first."""
        work = self._pool.submit(contextvars.copy_context().run, function, *arguments)
        self._work.append(work)
        return work

    def wait(self) -> None:
        """Until all of it is done, what it submits itself included. Nothing is raised here: what
        failed ahead of time fails again in its own."""
        while self._work:
            self._work.pop(0).exception()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        sys.setswitchinterval(self._switch)
        self._pool.shutdown(wait=False, cancel_futures=True)
