"""Where metrics go: a JSONL file always, the terminal, and TensorBoard on request.

One record is one line of `metrics.jsonl`, written and flushed at once, so that a killed run loses
at most the line it was writing. A resumed run appends; `read_metrics` keeps the last record of a
step that was run twice.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Metrics = Mapping[str, Any]
"""Names to numbers or to vectors (one number a layer)."""


class Tracker(Protocol):
    """Receives every record of a run."""

    def log(self, kind: str, step: int, metrics: Metrics) -> None:
        """Takes one record.

        Args:
            kind: `train`, `eval`, or the name of an event such as `resume`.
            step: optimizer steps done.
            metrics: numbers, vectors or short texts by name.
        """

    def close(self) -> None:
        """Writes out what is held back."""


class JsonlTracker:
    """One JSON object a line, appended.

    NaN and infinity are written as the strings `"nan"`, `"inf"`, `"-inf"`, for they are not JSON.

    Args:
        path: the file; made with its folders if absent. A torn last line of a killed run is
            closed, never removed.
        common: fields that every record carries.
    """

    def __init__(self, path: Path, common: Metrics | None = None):
        self.path = path
        self.common = dict(common or {})
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = _is_torn(path)
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def log(self, kind: str, step: int, metrics: Metrics) -> None:
        """Appends one line."""
        record = {"kind": kind, "step": step, **self.common, **metrics}
        self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order.

    Lines that a kill tore are left out; of several records of one kind, stage and step (a resumed
    run repeats the steps after its checkpoint) the last one stands.

    Args:
        path: the file.
        kind: only records of this kind.
    """
    records: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if kind is not None and record["kind"] != kind:
            continue
        event = number if record["kind"] not in ("train", "eval") else None
        key = (record["kind"], record.get("stage"), record["step"], event)
        records.pop(key, None)
        records[key] = record
    return list(records.values())


class ConsoleTracker:
    """A progress bar with the numbers that matter, and the records of evaluations as lines.

    Args:
        console: where to draw.
        title: shown before the bar.
        total: steps of the stage.
        shown: metric names shown behind the bar, in this order, if present.
        start: steps done before.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        total: int,
        shown: Sequence[str] = ("loss", "lm_loss", "kl", "tokens_per_second"),
        start: int = 0,
    ):
        self.console = console
        self.total = total
        self.shown = shown
        self.title = title
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self._task = self._progress.add_task(title, total=total, completed=start, numbers="")
        # A log file gets a line every twentieth of the run instead of a bar that redraws itself.
        self._stride = max(1, total // 20)
        self._next = start
        if console.is_terminal:
            self._progress.start()

    def log(self, kind: str, step: int, metrics: Metrics) -> None:
        """Moves the bar; anything but a training record becomes a line of its own."""
        if kind == "start":  # the summary has said it
            return
        if kind != "train":
            text = "  ".join(f"{k} {_short(v)}" for k, v in metrics.items() if _is_short(v))
            self.console.print(f"{self.title} step {step} {kind}: {text}", highlight=False)
            return
        numbers = "  ".join(
            f"{name} {_short(metrics[name])}" for name in self.shown if name in metrics
        )
        self._progress.update(self._task, completed=step, numbers=numbers)
        if not self.console.is_terminal and (step >= self._next or step == self.total):
            self.console.print(f"{self.title} {step}/{self.total}  {numbers}", highlight=False)
            self._next = step + self._stride

    def close(self) -> None:
        """Leaves the finished bar on the screen."""
        if self.console.is_terminal:
            self._progress.stop()


class TensorBoardTracker:
    """TensorBoard scalars; a vector becomes one scalar a layer.

    Args:
        folder: where the event files go.
        start: steps done before. What a killed run wrote of later ones is hidden: they run again.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, start: int = 0):
        try:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "log.tensorboard=True needs tensorboardX: pip install 'dsa-jax[tensorboard]', "
                "or leave it out (metrics.jsonl is written anyway)"
            ) from error
        # The library names files by the second: two writers of one second would share a file, and
        # the later one empty it. In this order TensorBoard reads them.
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(str(folder), purge_step=start + 1, filename_suffix=suffix)

    def log(self, kind: str, step: int, metrics: Metrics) -> None:
        """Writes every number of the record."""
        for name, value in metrics.items():
            if isinstance(value, str):
                continue
            for suffix, number in _scalars(value):
                self._writer.add_scalar(f"{kind}/{name}{suffix}", number, step)

    def close(self) -> None:
        """Flushes the events."""
        self._writer.close()


class Trackers:
    """Several trackers as one.

    Args:
        trackers: each receives every record, in this order.
    """

    def __init__(self, trackers: Sequence[Tracker]):
        self.trackers = tuple(trackers)

    def log(self, kind: str, step: int, metrics: Metrics) -> None:
        """Hands the record to each."""
        for tracker in self.trackers:
            tracker.log(kind, step, metrics)

    def close(self) -> None:
        """Closes each."""
        for tracker in self.trackers:
            tracker.close()


def _is_torn(path: Path) -> bool:
    """Whether the file ends in the middle of a line."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"


def _plain(value: Any) -> Any:
    """JSON-ready: arrays as lists, non-finite numbers as text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    return str(value)


def _scalars(value: Any) -> list[tuple[str, float]]:
    array = np.asarray(value, np.float64)
    if array.ndim == 0:
        return [("", float(array))]
    return [(f"/{i:02d}", float(x)) for i, x in enumerate(array.reshape(-1))]


def _is_short(value: Any) -> bool:
    return isinstance(value, str) or np.ndim(value) == 0


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{float(value):.4g}"
