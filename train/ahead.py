"""Work for other cores while the device trains: compiling what comes next."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# Tracing holds the interpreter, which the training loop needs too: more would slow it down.
_THREADS = 3


class Ahead:
    """A pool of threads that know what their creator knows (`dispatch.kernels`, for one)."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS)
        self._work: list[Future] = []

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
        self._pool.shutdown(wait=False, cancel_futures=True)
