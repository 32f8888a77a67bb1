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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console

from pallas_kernels import dispatch
from train import corpus, lessons, report
from train.config import TrainConfig, to_dict
from train.corpus import Corpus
from train.demo_evaluation import measure_cost
from train.demo_presets import PRESETS, Preset
from train.demo_seed import Interrupted, Seed
from train.laps import Laps
from train.stages import Stage
from train.state import skeleton_of
from train.tracker import read_metrics


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
    # XLA's search for the fastest matmuls takes longer than they could ever win back here, and
    # holds the GPU while the first stage trains.
    for flag in ("--xla_gpu_enable_triton_gemm=false", "--xla_gpu_autotune_level=0"):
        flags = os.environ.get("XLA_FLAGS", "")
        if flag.partition("=")[0] not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    # Several processes share the device: none may take three quarters of it at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
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
    laps = Laps()
    name = preset_name(config)
    preset = PRESETS[name]()
    settings = {"preset": name, "seeds": config.seeds, "seed": config.seed, **to_dict(preset)}
    folder = claim_folder(config.output, settings | {"kernels": config.kernels})
    text = corpus.write(
        folder / "text",
        length=preset.length,
        held_out_lengths=preset.held_out_lengths,
        hide=preset.needles is not None,
    )
    if preset.lessons:
        path = lessons.write(
            folder / "text" / "lessons.jsonl",
            preset.lessons,
            text.train_text,
            length=preset.length,
            planned=preset.batch_size * preset.dense.steps,
            count=preset.rows,
        )
        text = text._replace(train=path)
    console.print(
        f"{text.train_bytes:,} bytes of the King James Version to train on; held out: "
        f"{', '.join(corpus.HELD_OUT)} ({text.held_out_bytes:,} bytes). Run in {folder}",
        highlight=False,
    )
    laps.end("text")
    served = implementations(preset)
    console.print(report.implementation_table(served))
    seeds = range(config.seed, config.seed + config.seeds)
    with _quick_compiles() if preset.quick_compiles else contextlib.nullcontext():
        kernels = config.kernels != "off"
        runs = [
            Seed(preset, folder, text, seed, console, laps, kernels=kernels).run() for seed in seeds
        ]
    results = _results(config, name, preset, text, runs) | {"implementations": served}
    results["cost"] = measure_cost(preset, console)
    laps.end("time by position")
    results |= {"seconds": laps.total, "laps": laps.seconds}
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
        "examiners": preset.examiners,
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
            "lessons": [dataclasses.asdict(lesson) for lesson in preset.lessons],
        },
        "machine": {
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
        },
        "command": shlex.join(command),
        "snapshot": f"seed-{first['seed']}/selection.npz",
        # The layer that looks furthest back has the most to select.
        "snapshot_layer": int(np.argmin(recency)),
        "sample": first["sample"],
        "runs": runs,
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
