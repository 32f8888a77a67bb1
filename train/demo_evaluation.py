"""What the demo asks of its models: both ladders, the sweep over k, the needles, a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
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
from train.evaluate import Evaluation, Windows, evaluate, held_out
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
        kind: `ladder`, `long` or `sweep`.
        rung: weights and control.
        topk: keys.
        length: tokens a row.
        measure: whether to compute the selection metrics.
    """

    kind: str
    rung: Rung
    topk: int
    length: int
    measure: bool

    def program(self, own: int) -> tuple:
        """Equal for questions that one compiled program answers; `own` is the model's k."""
        way = Mode(self.rung.control, self.topk).way(own, self.length)
        return way.attention, way.keys, self.topk, self.length, self.measure


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
                yield Question("sweep", rung, k, p.length, False)

    def take(
        self, models: Mapping[str, Transformer], picture: Path, console: Console
    ) -> dict[str, Any]:
        """All answers, as plain numbers.

        Args:
            models: by the names in `train.ladder`.
            picture: file for the arrays behind the picture of a selection.
            console: for progress.
        """
        p = self.preset
        rows = {n: self.held_out(n) for n in (p.length, p.long_length)}
        found: dict[str, dict[str, Evaluation]] = {"ladder": {}, "long": {}}
        sweep: dict[int, dict[str, Evaluation]] = {k: {} for k in p.sweep}
        questions = list(self.questions())
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(questions))
            for q in questions:
                text = f"seed {self.seed}: {q.rung.title} (k = {q.topk}, T = {q.length})"
                progress.update(task, description=text)
                answers = sweep[q.topk] if q.kind == "sweep" else found[q.kind]
                answers[q.rung.name] = self.ask(q, models[q.rung.weights], rows[q.length])
                progress.advance(task)
        sweep[self.topk] = {name: found["ladder"][name] for name in ladder.SWEEP}
        np.savez_compressed(picture, **self.draw(models[ladder.SPARSE]))  # pyright: ignore
        same = found["ladder"]["warmed_all"], found["ladder"]["dense"]
        return self.needles(models, console) | {
            "ladder": ladder.summarise(found["ladder"], rows[p.length]),
            "long_ladder": ladder.summarise(found["long"], rows[p.long_length]),
            "sweep": {
                str(k): {name: e.cross_entropy for name, e in sweep[k].items()}
                for k in sorted(sweep)
            },
            "scored": int(same[1].weights.sum()),
            "checks": {
                "all_keys_difference": ladder.largest_difference(*same),
                "all_keys_differing_rows": ladder.differing_rows(*same),
                "all_keys_loss": abs(same[0].cross_entropy - same[1].cross_entropy),
            },
        }

    def rehearse(self, ahead: Ahead, model: Transformer) -> None:
        """Answers one question of each program with a model of no worth, to have it compiled."""
        programs = {q.program(self.topk): q for q in self.questions()}
        for q in programs.values():
            ahead.submit(self.ask, q, model, self.held_out(q.length)[:1])
        ahead.submit(self.draw, model)
        if self.preset.needles is not None:
            ways = {(r.control == "dense", r.control == "indexer"): r for r in self.asked()}
            for rung in ways.values():
                ahead.submit(self._answer, model, rung, 1)

    def ask(self, q: Question, model: Transformer, rows: list[Batch]) -> Evaluation:
        """One evaluation."""
        mode = Mode(q.rung.control, q.topk, self.seed)
        return evaluate(model, rows, mode, self.windows, measure=q.measure)

    def asked(self) -> list[Rung]:
        """The rungs that are asked for needles."""
        return ladder.rungs(ladder.ASKED)

    def needles(self, models: Mapping[str, Transformer], console: Console) -> dict[str, Any]:
        """The share of needles that each rung answers, if any are asked for."""
        grid = self.preset.needles
        if grid is None:
            return {}
        accuracy, documents = {}, {}
        for rung in self.asked():
            right = self._answer(models[rung.weights], rung)
            accuracy[rung.name] = right.mean(axis=1).tolist()
            documents[rung.name] = right.mean(axis=2).tolist()
            shares = ", ".join(
                f"{share:.2f} of {length}"
                for length, share in zip(grid.lengths, right.mean(axis=(1, 2)), strict=True)
            )
            console.print(f"needles answered, {rung.title}: {shares}", highlight=False)
        found = {"accuracy": accuracy, "documents": documents}
        return {"needles": {**dataclasses.asdict(grid), **found}}

    def _answer(self, model: Transformer, rung: Rung, batches: int | None = None) -> np.ndarray:
        grid = self.preset.needles
        assert grid is not None
        made = needles.documents(grid, self.text.held_out_text, self.seed)
        packed = needles.batches(grid, made)[:batches]
        mode = Mode(rung.control, self.topk, self.seed)
        return needles.evaluate(model, grid, made, packed, mode)

    def draw(self, model: Transformer) -> dict[str, np.ndarray]:
        """The arrays behind the picture of a selection."""
        rows = self.held_out(self.preset.picture_length or self.preset.length)
        return ladder.snapshot(model, rows[len(rows) // 2])

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
