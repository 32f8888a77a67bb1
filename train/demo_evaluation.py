"""What the demo asks of its models: both ladders, the sweep over k, the needles, a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dsa_jax.transformer import Transformer
from train import cost, ladder, needles
from train.ahead import Ahead
from train.config import DataConfig
from train.controls import Mode
from train.corpus import Corpus
from train.data import Batch, Rows
from train.demo_presets import Preset
from train.evaluate import Windows, evaluate, held_out
from train.ladder import Rung
from train.sources import open_corpus


def progress_bar(console: Console) -> Progress:
    """A bar with a description, a count and the time."""
    return Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console,
    )  # fmt: skip


def measure_cost(preset: Preset, console: Console, repeats: int = 9) -> dict[str, Any]:
    """What a token costs by its position on this machine, as plain numbers."""
    with progress_bar(console) as progress:
        task = progress.add_task("time by position", total=len(preset.cost_positions))
        measured = cost.measure(
            preset.cost_shape,
            preset.cost_positions,
            tokens=preset.cost_sequences,
            repeats=repeats,
            dtype=preset.compute_dtype,
            report=lambda position: progress.advance(task),
        )
    return {
        "shape": dataclasses.asdict(preset.cost_shape),
        "measured": [dataclasses.asdict(point) for point in measured],
    }


class Question(NamedTuple):
    """One evaluation.

    Attributes:
        kind: `ladder`, `long`, `sweep`, `needles` or `picture`.
        rung: weights and control.
        topk: keys.
        length: tokens a row.
        measure: whether to compute the selection metrics.
    """

    kind: str
    rung: Rung
    topk: int
    length: int
    measure: bool = False


class Exam:
    """The questions of one seed, the same for all models.

    Args:
        preset: sizes.
        text: rows.
        root: the demo's folder, for tokenised text.
        seed: of random keys and needles.
    """

    def __init__(self, preset: Preset, text: Corpus, *, root: Path, seed: int):
        self.preset, self.text, self.root, self.seed = preset, text, root, seed
        self.windows = Windows(preset.local, preset.sink, preset.buckets)
        assert preset.model.index_topk is not None
        self.topk = preset.model.index_topk

    def questions(self) -> Iterator[Question]:
        """All of them, in the order in which they are asked."""
        p = self.preset
        for rung in ladder.LADDER:
            yield Question("ladder", rung, self.topk, p.length, True)
        for rung in ladder.rungs(ladder.LONG):
            yield Question("long", rung, self.topk, p.long_length, True)
        for k in p.sweep:
            for rung in ladder.rungs(ladder.SWEEP):
                yield Question("sweep", rung, k, p.length)
        if p.needles is not None:
            for rung in ladder.rungs(ladder.ASKED):
                yield Question("needles", rung, self.topk, max(p.needles.lengths))
        for rung in ladder.rungs((ladder.SPARSE,)):
            yield Question("picture", rung, self.topk, p.picture_length or p.length)

    def program(self, q: Question) -> tuple:
        """Equal for questions that one compiled program answers."""
        kind = q.kind if q.kind in ("needles", "picture") else "loss"
        way = Mode(q.rung.control, q.topk).way(self.topk, q.length)
        return kind, way.attention, way.keys, q.topk, q.length, q.measure

    def rehearse(
        self, ahead: Ahead, model: Transformer, programs: Collection[tuple] | None = None
    ) -> None:
        """Answers one question of each program with a model of no worth, to have it compiled.

        Args:
            ahead: does it.
            model: of the right shapes.
            programs: which of them; None: all.
        """
        for program, q in {self.program(q): q for q in self.questions()}.items():
            if programs is None or program in programs:
                ahead.submit(self.answer, q, model, 1)

    def answer(self, q: Question, model: Transformer, batches: int | None = None) -> Any:
        """One answer.

        Args:
            q: what is asked.
            model: of the weights that the question is about.
            batches: of rows; None: all.

        Returns:
            An `Evaluation`; for needles `needles.evaluate`'s array; for the picture its arrays.
        """
        mode = Mode(q.rung.control, q.topk, self.seed)
        if q.kind == "needles":
            grid = self.preset.needles
            assert grid is not None
            made = needles.documents(grid, self.text.held_out_text, self.seed)
            packed = needles.batches(grid, made)[:batches]
            return needles.evaluate(model, grid, made, packed, mode)
        rows = self.held_out(q.length)
        if q.kind == "picture":
            return ladder.snapshot(model, rows[len(rows) // 2])
        return evaluate(model, rows[:batches], mode, self.windows, measure=q.measure)

    def take(
        self, answer: Callable[[Question], Any], picture: Path, console: Console
    ) -> dict[str, Any]:
        """All answers, as plain numbers.

        Args:
            answer: answers one question.
            picture: file for the arrays behind the picture of a selection.
            console: for progress.
        """
        found: dict[tuple[str, int], dict[str, Any]] = {}
        questions = list(self.questions())
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(questions))
            for q in questions:
                text = f"seed {self.seed}: {q.kind}, {q.rung.title} (k = {q.topk}, T = {q.length})"
                progress.update(task, description=text)
                found.setdefault((q.kind, q.topk), {})[q.rung.name] = answer(q)
                progress.advance(task)
        np.savez_compressed(picture, **found["picture", self.topk][ladder.SPARSE])
        steps, long = found["ladder", self.topk], found["long", self.topk]
        sweep = {k: found["sweep", k] for k in self.preset.sweep} | {self.topk: steps}
        same = steps["warmed_all"], steps["dense"]
        return self._needles(found.get(("needles", self.topk), {})) | {
            "ladder": ladder.summarise(steps, self.held_out(self.preset.length)),
            "long_ladder": ladder.summarise(long, self.held_out(self.preset.long_length)),
            "sweep": {
                str(k): {r.name: sweep[k][r.name].cross_entropy for r in ladder.rungs(ladder.SWEEP)}
                for k in sorted(sweep)
            },
            "scored": int(same[1].weights.sum()),
            "checks": {
                "all_keys_difference": ladder.largest_difference(*same),
                "all_keys_differing_rows": ladder.differing_rows(*same),
                "all_keys_loss": abs(same[0].cross_entropy - same[1].cross_entropy),
            },
        }

    def _needles(self, right: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The shares of needles answered, by depth and by document, if any were asked for."""
        if self.preset.needles is None:
            return {}
        accuracy = {rung: answers.mean(axis=1).tolist() for rung, answers in right.items()}
        documents = {rung: answers.mean(axis=2).tolist() for rung, answers in right.items()}
        grid = dataclasses.asdict(self.preset.needles)
        return {"needles": {**grid, "accuracy": accuracy, "documents": documents}}

    def data(self, path: Path) -> DataConfig:
        """A file of rows as documents, which fill the model's rows.

        Without marks: attention would rest on a mark at the start, and a control that does not
        keep that one key would fail for that reason alone.
        """
        return DataConfig(
            sources=(str(path),),
            mark_start=False,
            mark_end=False,
            shuffle=not self.preset.lessons,  # they come in their order
            token_cache=self.root / "tokens",
        )

    def held_out(self, length: int) -> list[Batch]:
        """Rows of the held-out books: fewer of the longer ones."""
        p = self.preset
        data = self.data(self.text.held_out[length])
        documents = open_corpus(data, p.model.vocab_size, self.root / "tokens")
        count = p.scored_rows // 2 if length > p.length else p.scored_rows
        return held_out(Rows(documents, length), count=count, batch_size=p.score_batch)
