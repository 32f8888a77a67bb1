"""Examiners: processes that compile the exam's programs, and answer it, while the stages train.

Tracing a program with kernels takes many seconds of Python, and a process runs one at a time. So
each examiner has some of the programs, an interpreter and a context on the device of its own, and
reads the models from their checkpoints as the stages end.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
from collections.abc import Collection
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from typing import Any

from dsa_jax.transformer import Transformer
from pallas_kernels import dispatch
from train.ahead import Ahead
from train.config import TrainConfig
from train.demo_evaluation import Exam, Question
from train.load import starting_model

_CORES = 3
"""For each examiner: the stages and the compilers want some too."""


class Examiners:
    """Processes that are asked one exam.

    Args:
        exam: what is asked.
        config: a run whose starting model has the shapes of all that will be handed in.
        kernels: whether kernels may serve; False: XLA for all.
        count: how many; None: as the machine's cores allow.
    """

    def __init__(
        self, exam: Exam, config: TrainConfig, *, kernels: bool = True, count: int | None = None
    ):
        self._exam = exam
        self._answers: dict[Question, Future] = {}
        programs = list(dict.fromkeys(exam.program(q) for q in exam.questions()))
        count = min(count or max(1, (os.cpu_count() or 1) // _CORES), len(programs))
        context = multiprocessing.get_context("spawn")
        self._pools = [
            ProcessPoolExecutor(1, context, _begin, (exam, kernels)) for _ in range(count)
        ]
        self._processes = [pool.submit(os.getpid) for pool in self._pools]
        self._place = {program: self._pools[i % count] for i, program in enumerate(programs)}
        for i, pool in enumerate(self._pools):
            pool.submit(_rehearse, programs[i::count], config)

    def hand_in(self, name: str, config: TrainConfig) -> None:
        """Has all questions answered that are asked of a model.

        Args:
            name: of the weights, as in `train.ladder`.
            config: a run that would start from them.
        """
        for q in self._exam.questions():
            if q.rung.weights == name:
                pool = self._place[self._exam.program(q)]
                try:
                    self._answers[q] = pool.submit(_answer, q, config)
                except BrokenExecutor as died:  # before it could be asked: `answer` says so
                    self._answers[q] = Future()
                    self._answers[q].set_exception(died)

    def answer(self, q: Question) -> Any:
        """One answer, as soon as it is there.

        Raises:
            BrokenExecutor: the examiner died; the device may have no room for another process.
        """
        return self._answers[q].result()

    def __enter__(self) -> Examiners:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes if error[0] else ():  # in the middle of something
            with contextlib.suppress(Exception):
                os.kill(process.result(timeout=30), signal.SIGTERM)
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


# --- in an examiner -------------------------------------------------------------------------------

_exam: Exam
_kernels: bool


def _begin(exam: Exam, kernels: bool) -> None:
    global _exam, _kernels
    _exam, _kernels = exam, kernels
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks is interrupted, and ends us


def _preference() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if _kernels else dispatch.kernels(False)


def _rehearse(programs: Collection[tuple], config: TrainConfig) -> None:
    with _preference(), Ahead() as ahead:
        _exam.rehearse(ahead, starting_model(config), programs)
        ahead.wait()


def _answer(q: Question, config: TrainConfig) -> Any:
    with _preference():
        return _exam.answer(q, _model(config))


@functools.lru_cache(maxsize=1)
def _model(config: TrainConfig) -> Transformer:
    """Read once for all questions about it, which come one after another."""
    return starting_model(config)
