"""One seed of the demo: four stages, what is asked of their models, and a sample of the last."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dsa_jax.generate import generate
from dsa_jax.tokenizer import ByteTokenizer
from dsa_jax.transformer import Transformer
from train import corpus, ladder
from train.ahead import Ahead
from train.config import CheckpointConfig, TrainConfig
from train.corpus import Corpus
from train.demo_evaluation import Exam, Question, measure_cost
from train.demo_presets import Preset, StagePlan
from train.examiners import Examiners
from train.laps import Laps
from train.load import starting_model
from train.loop import TrainResult, compile_step, train
from train.sources import open_corpus
from train.stages import Group, Stage, group_of
from train.state import Skeleton
from train.tracker import read_metrics

# Folders of a seed's stages, in the order in which they run.
_DENSE, _WARMUP, _SPARSE, _CONTROL = "dense", "warmup", "sparse", "control"


class Interrupted(RuntimeError):
    """SIGTERM or SIGINT ended a stage; the same command goes on."""


class Seed:
    """The four stages, the ladders and the sample of one seed."""

    def __init__(
        self,
        preset: Preset,
        folder: Path,
        text: Corpus,
        seed: int,
        console: Console,
        laps: Laps,
        *,
        kernels: bool = True,
    ):
        self.preset, self.root, self.text, self.seed = preset, folder, text, seed
        self.folder = folder / f"seed-{seed}"
        self.console, self.laps = console, laps
        self.exam = Exam(preset, text, root=folder, seed=seed)
        self.kernels = kernels
        self.steps: dict[str, Future] = {}
        self.examiners: Examiners | None = None

    def run(self) -> dict[str, Any]:
        """Everything, as plain numbers."""
        with Ahead() as self.ahead, contextlib.ExitStack() as stack:
            if self.preset.examiners:
                config = self.config(_WARMUP, Stage.WARMUP, self.preset.warmup, None)
                examiners = Examiners(self.exam, config, kernels=self.kernels)
                self.examiners = stack.enter_context(examiners)
            return self._run()

    def _run(self) -> dict[str, Any]:
        p = self.preset
        self.compile_ahead()
        self.laps.end("first compilation")
        dense = self.stage(_DENSE, Stage.DENSE, p.dense, None)
        graft = self.config(_WARMUP, Stage.WARMUP, p.warmup, dense.checkpoint_dir)
        self.hand_in(ladder.GRAFTED, graft)
        models = {ladder.GRAFTED: starting_model(graft)}
        self.laps.end("graft")
        warmed = self.stage(_WARMUP, Stage.WARMUP, p.warmup, dense.checkpoint_dir)
        # Both go on from the warm-up's checkpoint: the same main weights, to the bit, as the dense
        # one, and the same place in the data. The control ignores its indexer.
        plain = self.config(_CONTROL, Stage.DENSE, p.sparse, warmed.checkpoint_dir)
        self.hand_in(ladder.WARMED, plain)
        sparse = self.stage(_SPARSE, Stage.SPARSE, p.sparse, warmed.checkpoint_dir)
        self.hand_in(ladder.SPARSE, dataclasses.replace(plain, init_from=sparse.checkpoint_dir))
        control = self.stage(_CONTROL, Stage.DENSE, p.sparse, warmed.checkpoint_dir)
        self.hand_in(ladder.CONTROL, dataclasses.replace(plain, init_from=control.checkpoint_dir))
        models |= {
            ladder.WARMED: warmed.model,
            ladder.SPARSE: sparse.model,
            ladder.CONTROL: control.model,
        }
        stages = {_DENSE: dense, _WARMUP: warmed, _SPARSE: sparse, _CONTROL: control}
        out: dict[str, Any] = {"seed": self.seed}
        out["stages"] = {name: self.describe(name, result) for name, result in stages.items()}
        out["parameters"] = _count(sparse.model)
        self.ahead.wait()  # else both would compile what is not done yet
        self.laps.end("other compilations")
        out |= self.exam.take(self.answer(models), self.folder / "selection.npz", self.console)
        self.laps.end("evaluation")
        out["checks"]["changed_frozen_arrays"] = changed_arrays(
            models[ladder.GRAFTED], models[ladder.WARMED]
        )
        self.console.print("writing a sample")
        out["sample"] = self.sample(sparse.model)
        self.laps.end("sample")
        return out

    def hand_in(self, name: str, config: TrainConfig) -> None:
        """A model for the examiners, if there are any: what a run of `config` would start from."""
        if self.examiners is not None:
            self.examiners.hand_in(name, config)

    def answer(self, models: Mapping[str, Transformer]) -> Callable[[Question], Any]:
        """Who answers the exam's questions: the examiners, or if there are none we ourselves."""

        def answer(q: Question) -> Any:
            if self.examiners is not None:
                with contextlib.suppress(BrokenExecutor):
                    return self.examiners.answer(q)
            return self.exam.answer(q, models[q.rung.weights])

        return answer

    def compile_ahead(self) -> None:
        """The first stage's step now; what comes after it while it trains."""
        p = self.preset
        if not p.compile_ahead:
            return
        dense = self.config(_DENSE, Stage.DENSE, p.dense, None)
        self.steps[_DENSE] = self.ahead.submit(compile_step, dense)
        text = self.ahead.submit(open_corpus, dense.data, p.model.vocab_size, self.root / "tokens")
        text.result()  # before others compete with it, and with tracing the first step
        warmup = self.config(_WARMUP, Stage.WARMUP, p.warmup, None)
        sparse = self.config(_SPARSE, Stage.SPARSE, p.sparse, None)
        control = self.config(_CONTROL, Stage.DENSE, p.sparse, None)
        for name, config in ((_WARMUP, warmup), (_SPARSE, sparse), (_CONTROL, control)):
            self.steps[name] = self.ahead.submit(compile_step, config)
        self.ahead.submit(self.rehearse, warmup)

    def rehearse(self, config: TrainConfig) -> None:
        """Has all else compiled, with a model of no worth."""
        model = starting_model(config)
        if self.examiners is None:
            self.exam.rehearse(self.ahead, model)
        self.ahead.submit(self.sample, model)
        self.ahead.submit(measure_cost, self.preset, Console(quiet=True), 1)

    def config(self, name: str, stage: Stage, stage_plan: StagePlan, source: Path | None):
        """One stage's run."""
        p = self.preset
        has_indexer = name != _DENSE
        base = TrainConfig(
            output=self.folder / name,
            init_from=source,
            model=p.model if has_indexer else p.model.without_indexer(),
            data=self.exam.data(self.text.train),
            checkpoint=CheckpointConfig(interval=max(50, stage_plan.steps // 3), keep=1),
            batch_size=p.batch_size,
            sequence_length=p.length,
            compute_dtype=p.compute_dtype,  # pyright: ignore[reportArgumentType]
            seed=self.seed,
            remat=p.remat,
        )
        return stage_plan.apply(base, stage)

    def stage(
        self, name: str, stage: Stage, stage_plan: StagePlan, source: Path | None
    ) -> TrainResult:
        """Trains one stage, or goes on with it."""
        self.console.rule(f"seed {self.seed}: {name}, {stage_plan.steps} steps")
        config = self.config(name, stage, stage_plan, source)
        step = self.steps[name].result() if name in self.steps else None
        result = train(config, step=step, console=self.console)
        self.laps.end(name)
        if result.interrupted:
            raise Interrupted(
                f"stopped at step {result.step} of {name}, saved in {result.checkpoint_dir}; "
                "the same command goes on from there"
            )
        return result

    def describe(self, name: str, result: TrainResult) -> dict[str, Any]:
        """What the report says of a stage. Times come from the log: a resumed stage's too."""
        records = read_metrics(result.metrics_path, "train")
        stage_plan = {_DENSE: self.preset.dense, _WARMUP: self.preset.warmup}.get(
            name, self.preset.sparse
        )
        return {
            "steps": result.step,
            "tokens": result.step * self.preset.batch_size * self.preset.length,
            "seconds": sum(record["seconds"] for record in records),
            "rates": stage_plan.rates(result.config.stage),
            "metrics": result.metrics_path.relative_to(self.root).as_posix(),
            "checkpoint": result.checkpoint_dir.relative_to(self.root.absolute()).as_posix(),
            "model": f"seed-{self.seed}/{name}/model",
        }

    def sample(self, model: Transformer) -> dict[str, str]:
        """The model goes on where a held-out passage begins to be quoted."""
        tokenizer = ByteTokenizer()
        length = self.preset.sample_length or self.preset.length
        held = self.text.held_out[length].read_text(encoding="utf-8")
        texts = [json.loads(line)["text"] for line in held.splitlines()]
        # Rows that hold needles may begin with a question, and short ones quote nothing.
        text = [text for text in texts if " " in text.partition(corpus.QUOTE)[2][:-1]][self.seed]
        opening = text.index(corpus.QUOTE) + 1
        prompt = text[: text.index(" ", opening) + 1]
        made = generate(
            model,
            [tokenizer.encode(prompt)],
            max_new_tokens=length - len(prompt),
        )
        return {
            "prompt": prompt,
            "text": tokenizer.decode(made.tokens[0]),
            "truth": text[len(prompt) :],
        }


def changed_arrays(before: Transformer, after: Transformer) -> int:
    """How many parameters outside the indexers differ in any bit."""
    old, new = (Skeleton(model).params(model) for model in (before, after))
    frozen = [path for path in old if group_of(path) is not Group.INDEXER]
    return sum(
        np.asarray(old[path]).tobytes() != np.asarray(new[path]).tobytes() for path in frozen
    )


def _count(model: Transformer) -> dict[str, int]:
    params = Skeleton(model).params(model)
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in params.items()}
    indexers = sum(n for path, n in sizes.items() if group_of(path) is Group.INDEXER)
    return {"all": sum(sizes.values()), "indexer": indexers}
