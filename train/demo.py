"""`python -m train demo`: what DeepSeek Sparse Attention does, on real text, in minutes.

Pre-trains a small dense model, grafts an indexer onto it, warms the indexer up, goes on with
sparse training and, from the same weights over the same tokens, with a dense control; evaluates all
of them on held-out books; and writes a report that checks its own claims. Every stage is an
ordinary `train.loop.train` run, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dsa_jax.generate import generate
from dsa_jax.tokenizer import ByteTokenizer
from dsa_jax.transformer import Transformer
from train import corpus, cost, ladder, report
from train.config import CheckpointConfig, DataConfig, TrainConfig, to_dict
from train.controls import Mode
from train.corpus import Corpus
from train.data import Batch, Rows
from train.demo_presets import PRESETS, Preset, StagePlan
from train.evaluate import Evaluation, Windows, evaluate, held_out
from train.load import starting_model
from train.loop import TrainResult, train
from train.sources import open_corpus
from train.stages import Group, Stage, group_of
from train.state import Skeleton
from train.tracker import read_metrics

# Folders of a seed's stages, in the order in which they run.
_DENSE, _WARMUP, _SPARSE, _CONTROL = "dense", "warmup", "sparse", "control"


class Interrupted(RuntimeError):
    """SIGTERM or SIGINT ended a stage; the same command goes on."""


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Train, sparsify, evaluate and report on real text."""

    output: Path = Path("runs/demo")
    """Folder of the run. An unfinished demo of the same settings is continued; if another one is
    there, the run goes to the same name with a number."""
    preset: Literal["cpu", "smoke"] = "cpu"
    """`cpu`: about ten minutes on two cores. `smoke`: under a minute, to see that all works."""
    smoke: bool = False
    """Short for `--preset smoke`."""
    seeds: int = 1
    """Runs with seeds `seed`, `seed` + 1, ...; the report gives mean and range."""
    seed: int = 0
    """Of the first run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    config = tyro.cli(DemoConfig, args=given, prog="python -m train demo")
    console = Console()
    try:
        run(config, console)
    except Interrupted as stop:
        console.print(str(stop), style="yellow", markup=False, highlight=False)
        return 130
    except KeyboardInterrupt:  # between two stages
        console.print("stopped; the same command goes on", style="yellow")
        return 130
    return 0


def run(config: DemoConfig, console: Console) -> Path:
    """The whole demo.

    Returns:
        The run's folder, with `report.md`, `results.json`, `metrics.jsonl` and the checkpoints.
    """
    if config.seeds < 1:
        raise ValueError(f"seeds={config.seeds}: must be at least 1")
    name = "smoke" if config.smoke else config.preset
    preset = PRESETS[name]()
    settings = {"preset": name, "seeds": config.seeds, "seed": config.seed, **to_dict(preset)}
    folder = claim_folder(config.output, settings)
    lengths = (preset.length, preset.long_length)
    text = corpus.write(folder / "text", length=preset.length, held_out_lengths=lengths)
    console.print(
        f"{text.train_bytes:,} bytes of the King James Version to train on; held out: "
        f"{', '.join(corpus.HELD_OUT)} ({text.held_out_bytes:,} bytes). Run in {folder}",
        highlight=False,
    )
    seeds = range(config.seed, config.seed + config.seeds)
    with _quick_compiles() if preset.quick_compiles else contextlib.nullcontext():
        runs = [_Seed(preset, folder, text, seed, console).run() for seed in seeds]
    results = _results(config, name, preset, text, runs)
    results["cost"] = _measure_cost(preset, console)
    _write_json(folder / "results.json", results)
    _collect_metrics(folder, results)
    path = report.write(folder)
    console.print(report.table(results))
    console.print(report.verdict_table(report.check(results)))
    console.print(report.sample_text(results["sample"]))
    _say_where(console, path, folder, results)
    return folder


@contextlib.contextmanager
def _quick_compiles() -> Iterator[None]:
    """Two dozen programs that run for milliseconds each are not worth the compiler's best."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def claim_folder(output: Path, settings: Mapping[str, Any]) -> Path:
    """The folder to run in: `output`, or with a number if it holds another or a finished demo."""
    number = 1
    while True:
        folder = output if number == 1 else output.with_name(f"{output.name}-{number}")
        number += 1
        marker = folder / "settings.json"
        if not folder.exists() or not any(folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(marker, settings)
            return folder
        if not marker.is_file() or (folder / "report.md").exists():
            continue
        if json.loads(marker.read_text(encoding="utf-8")) == json.loads(json.dumps(settings)):
            return folder


# --- one seed -------------------------------------------------------------------------------------


class _Seed:
    """The four stages, the ladders and the sample of one seed."""

    def __init__(self, preset: Preset, folder: Path, text: Corpus, seed: int, console: Console):
        self.preset, self.root, self.text, self.seed = preset, folder, text, seed
        self.folder = folder / f"seed-{seed}"
        self.console = console

    def run(self) -> dict[str, Any]:
        """Everything, as plain numbers."""
        began = time.perf_counter()
        p = self.preset
        dense = self.stage(_DENSE, Stage.DENSE, p.dense, None)
        models = {ladder.GRAFTED: self.graft(dense)}
        warmed = self.stage(_WARMUP, Stage.WARMUP, p.warmup, dense.checkpoint_dir)
        # Both go on from the warm-up's checkpoint: the same main weights, to the bit, as the dense
        # one, and the same place in the data. The control ignores its indexer.
        sparse = self.stage(_SPARSE, Stage.SPARSE, p.sparse, warmed.checkpoint_dir)
        control = self.stage(_CONTROL, Stage.DENSE, p.sparse, warmed.checkpoint_dir)
        models |= {
            ladder.WARMED: warmed.model,
            ladder.SPARSE: sparse.model,
            ladder.CONTROL: control.model,
        }
        stages = {_DENSE: dense, _WARMUP: warmed, _SPARSE: sparse, _CONTROL: control}
        out: dict[str, Any] = {"seed": self.seed}
        out["stages"] = {name: self.describe(name, result) for name, result in stages.items()}
        out["parameters"] = _count(sparse.model)
        out |= self.evaluate(models)
        out["checks"]["changed_frozen_arrays"] = changed_arrays(
            models[ladder.GRAFTED], models[ladder.WARMED]
        )
        out["sample"] = self.sample(sparse.model)
        out["seconds"] = time.perf_counter() - began
        return out

    def config(self, name: str, stage: Stage, stage_plan: StagePlan, source: Path | None):
        """One stage's run."""
        p = self.preset
        has_indexer = name != _DENSE
        base = TrainConfig(
            output=self.folder / name,
            init_from=source,
            model=p.model if has_indexer else p.model.without_indexer(),
            data=self.data(self.text.train),
            checkpoint=CheckpointConfig(interval=max(50, stage_plan.steps // 3), keep=1),
            batch_size=p.batch_size,
            sequence_length=p.length,
            compute_dtype=p.compute_dtype,  # pyright: ignore[reportArgumentType]
            seed=self.seed,
            remat="none",  # activations of rows this short fit: recomputing would only cost time
        )
        return stage_plan.apply(base, stage)

    def stage(
        self, name: str, stage: Stage, stage_plan: StagePlan, source: Path | None
    ) -> TrainResult:
        """Trains one stage, or goes on with it."""
        self.console.rule(f"seed {self.seed}: {name}, {stage_plan.steps} steps")
        result = train(self.config(name, stage, stage_plan, source), console=self.console)
        if result.interrupted:
            raise Interrupted(
                f"stopped at step {result.step} of {name}, saved in {result.checkpoint_dir}; "
                "the same command goes on from there"
            )
        return result

    def graft(self, dense: TrainResult) -> Transformer:
        """The dense model with the fresh indexer that warm-up starts from."""
        return starting_model(
            self.config(_WARMUP, Stage.WARMUP, self.preset.warmup, dense.checkpoint_dir)
        )

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

    def evaluate(self, models: Mapping[str, Transformer]) -> dict[str, Any]:
        """Both ladders, the sweep over k, and the picture of a selection."""
        p, topk = self.preset, self.preset.model.index_topk
        assert topk is not None
        short = self.held_out(p.length, p.scored_rows)
        long = self.held_out(p.long_length, p.scored_rows // 2)
        far, sweep = ladder.rungs(ladder.LONG), ladder.rungs(ladder.SWEEP)
        total = len(ladder.LADDER) + len(far) + len(p.sweep) * len(sweep)
        with _progress(self.console) as progress:
            task = progress.add_task("", total=total)

            def climb(
                rungs: Sequence[ladder.Rung], batches: list[Batch], k: int, measure: bool = True
            ) -> dict[str, Evaluation]:
                found = {}
                for rung in rungs:
                    length = batches[0]["tokens"].shape[1]
                    text = f"seed {self.seed}: {rung.title} (k = {k}, T = {length})"
                    progress.update(task, description=text)
                    mode, model = Mode(rung.control, k, self.seed), models[rung.weights]
                    found[rung.name] = evaluate(model, batches, mode, self.windows, measure=measure)
                    progress.advance(task)
                return found

            first = climb(ladder.LADDER, short, topk)
            second = climb(far, long, topk)
            others = {k: climb(sweep, short, k, measure=False) for k in p.sweep}
        others[topk] = {rung.name: first[rung.name] for rung in sweep}
        picture = ladder.snapshot(models[ladder.SPARSE], short[len(short) // 2])
        np.savez_compressed(self.folder / "selection.npz", **picture)  # pyright: ignore
        same = first["warmed_all"], first["dense"]
        return {
            "ladder": ladder.summarise(first, short),
            "long_ladder": ladder.summarise(second, long),
            "sweep": {
                str(k): {name: e.cross_entropy for name, e in found.items()}
                for k, found in sorted(others.items())
            },
            "scored": int(first["dense"].weights.sum()),
            "checks": {
                "all_keys_difference": ladder.largest_difference(*same),
                "all_keys_differing_rows": ladder.differing_rows(*same),
            },
        }

    @property
    def windows(self) -> Windows:
        """What the metrics call near, first, and a bucket."""
        return Windows(self.preset.local, self.preset.sink, self.preset.buckets)

    def data(self, path: Path) -> DataConfig:
        """A file of rows as documents, each of which fills a row of the model.

        Without marks: attention would rest on a mark at the start, and a control that does not
        keep that one key would fail for that reason alone.
        """
        return DataConfig(
            sources=(str(path),),
            mark_start=False,
            mark_end=False,
            token_cache=self.root / "tokens",
        )

    def held_out(self, length: int, count: int) -> list[Batch]:
        """Rows of the held-out books."""
        data = self.data(self.text.held_out[length])
        documents = open_corpus(data, self.preset.model.vocab_size, self.root / "tokens")
        rows = Rows(documents, length)
        return held_out(rows, count=count, batch_size=self.preset.score_batch)

    def sample(self, model: Transformer) -> dict[str, str]:
        """The model goes on where a held-out passage begins to be quoted."""
        tokenizer = ByteTokenizer()
        held = self.text.held_out[self.preset.length].read_text(encoding="utf-8")
        text = json.loads(held.split("\n")[self.seed])["text"]
        opening = text.index(corpus.QUOTE) + 1
        prompt = text[: text.index(" ", opening) + 1]
        self.console.print("writing a sample")
        made = generate(
            model,
            [tokenizer.encode(prompt)],
            max_new_tokens=self.preset.length - len(prompt),
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


# --- results --------------------------------------------------------------------------------------


def _results(
    config: DemoConfig, name: str, preset: Preset, text: Corpus, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    first, m = runs[0], preset.model
    size = f"{m.num_hidden_layers - m.first_k_dense_replace} of them with {m.n_routed_experts}"
    recency = first["ladder"]["sparse"]["layers"]["oracle_local"]
    command = ["python", "-m", "train", "demo", "--preset", name]
    command += ["--seeds", str(config.seeds), "--seed", str(config.seed)]
    return {
        "preset": name,
        "topk": m.index_topk,
        "length": preset.length,
        "long_length": preset.long_length,
        "local": preset.local,
        "model": {
            "layers": m.num_hidden_layers,
            "parameters": first["parameters"]["all"],
            "indexer_parameters": first["parameters"]["indexer"],
            "description": f"{size} experts ({m.num_experts_per_tok} active, {m.n_shared_experts} "
            f"shared); width {m.hidden_size}, {m.num_attention_heads} heads, latent "
            f"{m.kv_lora_rank}, {m.index_n_heads} indexer heads of {m.index_head_dim}",
        },
        "corpus": {
            "license": corpus.LICENSE,
            "train_bytes": text.train_bytes,
            "held_out_bytes": text.held_out_bytes,
            "held_out": list(corpus.HELD_OUT),
            "scored": first["scored"],
        },
        "machine": {
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
        },
        "command": shlex.join(command),
        "seconds": sum(run["seconds"] for run in runs),
        "snapshot": f"seed-{first['seed']}/selection.npz",
        # The layer that looks furthest back has the most to select.
        "snapshot_layer": int(np.argmin(recency)),
        "sample": first["sample"],
        "runs": runs,
    }


def _measure_cost(preset: Preset, console: Console) -> dict[str, Any]:
    with _progress(console) as progress:
        task = progress.add_task("time by position", total=len(preset.cost_positions))
        measured = cost.measure(
            preset.cost_shape,
            preset.cost_positions,
            tokens=4,
            repeats=9,
            report=lambda position: progress.advance(task),
        )
    return {
        "shape": dataclasses.asdict(preset.cost_shape),
        "measured": [dataclasses.asdict(point) for point in measured],
    }


def _collect_metrics(folder: Path, results: Mapping[str, Any]) -> None:
    """All records of all stages and seeds in one `metrics.jsonl`, and the ladders behind them."""
    lines = []
    for one in results["runs"]:
        for name, stage in one["stages"].items():
            for record in read_metrics(folder / stage["metrics"]):
                lines.append({"seed": one["seed"], "run": name, **record})
        for kind in ("ladder", "long_ladder"):
            for rung, numbers in one[kind].items():
                lines.append({"seed": one["seed"], "kind": kind, "rung": rung, **numbers})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    _write_text(folder / "metrics.jsonl", text)


def _say_where(console: Console, path: Path, folder: Path, results: Mapping[str, Any]) -> None:
    for one in results["runs"]:
        for name, stage in one["stages"].items():
            console.print(f"{name:>8}  {folder / stage['checkpoint']}", highlight=False)
    console.print(f" metrics  {folder / 'metrics.jsonl'}", highlight=False)
    console.print(f"  report  [bold]{path}[/] ({results['seconds']:.0f} s)", highlight=False)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console,
    )  # fmt: skip


def _write_json(path: Path, data: Any) -> None:
    _write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Written aside and moved: the file is whole or not there."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
