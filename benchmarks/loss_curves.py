"""Training losses by kernels and by XLA from the same start on the same tokens, overlaid.

    python -m benchmarks.loss_curves --json FILE --figure FIGURE.png

The GPU demo's model with fewer layers, on short rows: some steps of dense training, of warm-up, and
of sparse training, each from where the one before ended. Rounding at other places makes two runs
drift apart, and how far is a property of training, not of kernels. So a third run measures it: XLA
again, every initial weight moved by one rounding to bf16 (2**-9 of its value, up or down). The
curves count as equal if kernels are no further from XLA than `LIMIT` times that run is, in the root
of the mean square over a stage's steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import environment
from pallas_kernels import dispatch
from train import corpus, lessons
from train.config import DataConfig, TrainConfig
from train.data import Batch, Rows
from train.demo_presets import PRESETS
from train.lessons import Lesson
from train.optimizer import make_optimizer
from train.sources import open_corpus
from train.stages import Stage
from train.state import Params, build, new_state, skeleton_of
from train.step import make_step

STEPS, ROWS, LENGTH, LAYERS = 40, 2, 2048, 2
STAGES = (Stage.DENSE, Stage.WARMUP, Stage.SPARSE)
CURVES = {Stage.DENSE: "lm_loss", Stage.WARMUP: "kl", Stage.SPARSE: "lm_loss"}
LIMIT = 2.0
RUNS = ("xla", "moved", "kernels")


def config(stage: Stage) -> TrainConfig:
    """A stage of the demo, shortened."""
    preset = PRESETS["gpu"]()
    plan = {Stage.DENSE: preset.dense, Stage.WARMUP: preset.warmup, Stage.SPARSE: preset.sparse}
    base = TrainConfig(
        model=preset.model.replace(num_hidden_layers=LAYERS),
        batch_size=ROWS,
        sequence_length=LENGTH,
        compute_dtype="bfloat16",
        remat="none",
    )
    return dataclasses.replace(plan[stage], steps=STEPS).apply(base, stage).resolved()


def start(moved: bool) -> Params:
    """The initial parameters; `moved`: each by one rounding to bf16, up or down."""
    one = config(Stage.SPARSE)
    params = skeleton_of(one).params(build(one, (0, 0)))
    if not moved:
        return params
    sign = lambda i, x: jnp.where(jax.random.bernoulli(jax.random.key(i), 0.5, x.shape), 1, -1)  # noqa: E731
    return {p: x * (1 + 2.0**-9 * sign(i, x)) for i, (p, x) in enumerate(sorted(params.items()))}


def stage_run(stage: Stage) -> Callable[[Params, Mapping[str, Any]], tuple[Params, Any]]:
    """A whole stage as one function of the parameters and its batches `[steps, B, T]`: the
    parameters at the end, and the curve."""
    one = config(stage)
    optimizer = make_optimizer(one)
    step = make_step(one, skeleton_of(one), optimizer)

    def run(params: Params, batches: Mapping[str, Any]) -> tuple[Params, Any]:
        def body(state, batch):
            state, metrics = step(state, batch)
            return state, metrics[CURVES[stage]]

        state, curve = jax.lax.scan(body, new_state(one, params, optimizer), batches)
        return state.params, curve

    return run


def batches(folder: Path) -> Iterator[Batch]:
    """The demo's text in its own order, `[steps, B, T]` a stage."""
    text = corpus.write(folder, length=LENGTH, held_out_lengths=()).train_text
    kinds = [Lesson("text", length, 0.0, 1.0) for length in (256, 512, LENGTH)]
    count = len(STAGES) * STEPS * ROWS
    path = lessons.write(
        folder / "rows.jsonl", kinds, text, length=LENGTH, planned=count, count=count
    )
    data = DataConfig(
        sources=(str(path),), mark_start=False, mark_end=False, token_cache=folder / "tokens"
    )
    rows = Rows(open_corpus(data, config(Stage.DENSE).model.vocab_size, folder / "tokens"), LENGTH)
    for part in np.split(np.arange(count), len(STAGES)):
        taken = [rows[int(row)] for row in part]
        shape = (STEPS, ROWS, LENGTH)
        yield {name: np.stack([row[name] for row in taken]).reshape(shape) for name in taken[0]}


def compare(curves: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    """By stage, how far kernels and the moved run are from XLA, and whether that is equal."""
    found = {}
    for stage in STAGES:
        reference = np.array(curves["xla"][stage.value])
        far = {
            name: float(np.sqrt(np.mean((np.array(curves[name][stage.value]) - reference) ** 2)))
            for name in ("kernels", "moved")
        }
        found[stage.value] = far | {"equal": far["kernels"] <= LIMIT * far["moved"]}
    return found


def draw(results: Mapping[str, Any], path: Path) -> None:
    """The curves, a panel a stage."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(STAGES), figsize=(12, 3.6), layout="constrained")
    looks = {"xla": ("#3a3a3a", "-"), "moved": ("#e69f00", ":"), "kernels": ("#0072b2", "--")}
    names = {"xla": "XLA", "moved": "XLA, weights moved by one rounding", "kernels": "kernels"}
    for axes, stage in zip(panels, STAGES, strict=True):
        for name, (color, line) in looks.items():
            axes.plot(results["curves"][name][stage.value], line, color=color, label=names[name])
        far = results["distances"][stage.value]
        axes.set_title(
            f"{stage.value}: kernels {far['kernels']:.1e} from XLA, moved {far['moved']:.1e}",
            fontsize=9,
        )
        axes.set(xlabel="step", ylabel="KL, nats" if stage is Stage.WARMUP else "loss, nats/byte")
        axes.grid(alpha=0.25)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs all, or draws what was run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--draw-only", action="store_true", help="the figure from an older file")
    options = parser.parse_args()
    if not options.draw_only:
        with tempfile.TemporaryDirectory() as folder:
            texts = dict(zip(STAGES, batches(Path(folder)), strict=True))
        curves: dict[str, dict[str, list[float]]] = {}
        programs = {
            (stage, by): jax.jit(stage_run(stage)) for stage in STAGES for by in (False, True)
        }
        for name in RUNS:
            params, curves[name] = start(name == "moved"), {}
            for stage in STAGES:
                with dispatch.kernels(name == "kernels"):
                    run = programs[stage, name == "kernels"]
                    params, curve = run(params, texts[stage])
                curves[name][stage.value] = np.asarray(curve, np.float64).tolist()
        results = {"environment": environment(), "curves": curves, "distances": compare(curves)}
        options.json.write_text(json.dumps(results) + "\n")
    results = json.loads(options.json.read_text())
    print(json.dumps(results["distances"], indent=1))
    if options.figure is not None:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
