"""SIGTERM and Ctrl-C as a polite request: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax
import orbax.checkpoint as ocp


class StopRequest:
    """A context in which SIGTERM and SIGINT ask instead of kill; a second one kills as usual.

    Schedulers send SIGTERM some seconds or minutes before they take a machine away. In a run of
    several processes the signals may arrive between different steps, so there the decision is
    left to JAX's preemption service, which names one step to all of them. It takes SIGTERM only;
    Ctrl-C is handed to it as one.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            alone = jax.process_count() == 1
            for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def after(self, step: int, manager: ocp.CheckpointManager) -> bool:
        """Whether the run should save and end after this step."""
        if jax.process_count() == 1:
            return self._requested
        return manager.reached_preemption(step)
