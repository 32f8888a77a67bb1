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
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console

from dsa_jax.generate import generate
from dsa_jax.tokenizer import ByteTokenizer
from dsa_jax.transformer import Transformer
from pallas_kernels import dispatch
from train import corpus, cost, ladder, report
from train.ahead import Ahead
from train.config import CheckpointConfig, TrainConfig, to_dict
from train.corpus import Corpus
from train.demo_evaluation import Exam, progress_bar
from train.demo_presets import PRESETS, Preset, StagePlan
from train.load import starting_model
from train.loop import TrainResult, compile_step, train
from train.stages import Group, Stage, group_of
from train.state import Skeleton, skeleton_of
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
    preset: Literal["auto", "cpu", "gpu", "smoke"] = "auto"
    """`cpu`: about ten minutes on two cores. `gpu`: a larger model on rows of 8192, about five
    minutes on one Hopper GPU. `smoke`: under a minute, to see that all works. `auto`: `gpu` where
    the kernels run, else `cpu`."""
    kernels: Literal["auto", "off"] = "auto"
    """`auto`: kernels for every op that they serve, on a Hopper GPU. `off`: XLA for all."""
    smoke: bool = False
    """Short for `--preset smoke`."""
    seeds: int = 1
    """Runs with seeds `seed`, `seed` + 1, ...; the report gives mean and range."""
    seed: int = 0
    """Of the first run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Triton's candidates for small matmuls take longer to compile than they could ever win here.
    flag = "--xla_gpu_enable_triton_gemm"
    if flag not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()
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
    with dispatch.kernels(False) if config.kernels == "off" else contextlib.nullcontext():
        return _run(config, console)


def _run(config: DemoConfig, console: Console) -> Path:
    name = preset_name(config)
    preset = PRESETS[name]()
    settings = {"preset": name, "seeds": config.seeds, "seed": config.seed, **to_dict(preset)}
    folder = claim_folder(config.output, settings | {"kernels": config.kernels})
    text = corpus.write(
        folder / "text",
        length=preset.length,
        held_out_lengths=preset.held_out_lengths,
        mixture=preset.mixture,
        hide=preset.needles is not None,
    )
    console.print(
        f"{text.train_bytes:,} bytes of the King James Version to train on; held out: "
        f"{', '.join(corpus.HELD_OUT)} ({text.held_out_bytes:,} bytes). Run in {folder}",
        highlight=False,
    )
    served = implementations(preset)
    console.print(report.implementation_table(served))
    seeds = range(config.seed, config.seed + config.seeds)
    with _quick_compiles() if preset.quick_compiles else contextlib.nullcontext():
        runs = [_Seed(preset, folder, text, seed, console).run() for seed in seeds]
    results = _results(config, name, preset, text, runs) | {"implementations": served}
    results["cost"] = _measure_cost(preset, console)
    _write_json(folder / "results.json", results)
    _collect_metrics(folder, results)
    path = report.write(folder)
    console.print(report.table(results))
    if preset.needles is not None:
        console.print(report.needle_table(results))
    console.print(report.verdict_table(report.check(results)))
    console.print(report.sample_text(results["sample"]))
    _say_where(console, path, folder, results)
    return folder


def preset_name(config: DemoConfig) -> str:
    """The preset that a config means on this machine."""
    if config.smoke:
        return "smoke"
    if config.preset == "auto":
        return "gpu" if dispatch.hopper_is_default() else "cpu"
    return config.preset


def implementations(preset: Preset) -> dict[str, str]:
    """Which implementation serves each op of training, `mosaic` or `xla`: traced, not run."""
    plan = preset.warmup.apply(
        TrainConfig(
            model=preset.model,
            batch_size=preset.batch_size,
            sequence_length=preset.length,
            compute_dtype=preset.compute_dtype,  # pyright: ignore[reportArgumentType]
        ),
        Stage.WARMUP,
    )
    skeleton = skeleton_of(plan.resolved())
    tokens = jax.ShapeDtypeStruct((preset.batch_size, preset.length), np.int32)

    def forward(params: Any, tokens: Any, stage: Stage) -> Any:
        out = skeleton.model(params)(
            tokens,
            segment_ids=tokens,
            attention=stage.attention,
            indexer_loss=stage.indexer_loss,
        )
        return out.kl

    with dispatch.recorded() as found:
        for stage in (Stage.WARMUP, Stage.SPARSE):
            jax.eval_shape(functools.partial(forward, stage=stage), skeleton.shapes, tokens)
    return found


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
        self.exam = Exam(preset, text, root=folder, seed=seed)
        self.steps: dict[str, Future] = {}

    def run(self) -> dict[str, Any]:
        """Everything, as plain numbers."""
        with Ahead() as self.ahead:
            return self._run()

    def _run(self) -> dict[str, Any]:
        began = time.perf_counter()
        p = self.preset
        self.compile_ahead()
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
        out |= self.exam.take(models, self.folder / "selection.npz", self.console)
        out["checks"]["changed_frozen_arrays"] = changed_arrays(
            models[ladder.GRAFTED], models[ladder.WARMED]
        )
        out["sample"] = self.sample(sparse.model)
        out["seconds"] = time.perf_counter() - began
        return out

    def compile_ahead(self) -> None:
        """The first stage's step now; what comes after it while it trains."""
        p = self.preset
        if not p.compile_ahead:
            return
        dense = self.config(_DENSE, Stage.DENSE, p.dense, None)
        self.steps[_DENSE] = self.ahead.submit(compile_step, dense)
        self.steps[_DENSE].result()  # before others compete with it
        warmup = self.config(_WARMUP, Stage.WARMUP, p.warmup, None)
        sparse = self.config(_SPARSE, Stage.SPARSE, p.sparse, None)
        control = self.config(_CONTROL, Stage.DENSE, p.sparse, None)
        for name, config in ((_WARMUP, warmup), (_SPARSE, sparse), (_CONTROL, control)):
            self.steps[name] = self.ahead.submit(compile_step, config)
        self.exam.rehearse(self.ahead, starting_model(warmup))

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

    def sample(self, model: Transformer) -> dict[str, str]:
        """The model goes on where a held-out passage begins to be quoted."""
        tokenizer = ByteTokenizer()
        length = self.preset.sample_length or self.preset.length
        held = self.text.held_out[length].read_text(encoding="utf-8")
        texts = [json.loads(line)["text"] for line in held.splitlines()]
        # Rows that hold needles may begin with a question, and short ones quote nothing.
        text = [text for text in texts if " " in text.partition(corpus.QUOTE)[2]][self.seed]
        opening = text.index(corpus.QUOTE) + 1
        prompt = text[: text.index(" ", opening) + 1]
        self.console.print("writing a sample")
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


# --- results --------------------------------------------------------------------------------------


def _results(
    config: DemoConfig, name: str, preset: Preset, text: Corpus, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    first, m = runs[0], preset.model
    size = f"{m.num_hidden_layers - m.first_k_dense_replace} of them with {m.n_routed_experts}"
    recency = first["ladder"]["sparse"]["layers"]["oracle_local"]
    command = ["python", "-m", "train", "demo", "--preset", name]
    command += ["--seeds", str(config.seeds), "--seed", str(config.seed)]
    command += ["--kernels", "off"] if config.kernels == "off" else []
    return {
        "preset": name,
        "topk": m.index_topk,
        "compute_dtype": preset.compute_dtype,
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
            "mixture": list(preset.mixture),
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
    with progress_bar(console) as progress:
        task = progress.add_task("time by position", total=len(preset.cost_positions))
        measured = cost.measure(
            preset.cost_shape,
            preset.cost_positions,
            tokens=4,
            repeats=9,
            dtype=preset.compute_dtype,
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


def _write_json(path: Path, data: Any) -> None:
    _write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Written aside and moved: the file is whole or not there."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
