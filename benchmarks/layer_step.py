"""One real-shaped layer through a whole training step on a GPU, by kernels, by XLA, and dense.

    python -m benchmarks.layer_step --cases "sparse 32768" --json FILE

The layer is DeepSeek-V3.2-Exp's: 7168 wide, 128 heads, latents of 1536 and 512 + 64, 64 indexer
heads of 128, 2048 selected keys; 16 experts, of which a token takes 8, and a shared one; bf16 with
fp32 masters and AdamW. A *warm-up* step is the layer's forward pass under dense attention, value
and gradient of the indexer's KL, and the indexer's update. A *sparse* step adds the backward pass
for a gradient that arrives from above, down to the layer's input, and updates everything; a
*dense* step is the same without an indexer: what pre-training would do.

Time is device time by CUPTI; peak memory is the device's own count. XLA multiplies every row with
every expert in memory: beyond 8K tokens it takes fewer experts (`--experts 4 --experts-of-a-token
2`). `benchmarks.layer_check` compares the gradients of kernels and XLA.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.experimental.mosaic.gpu import profiler

from benchmarks.ops import Results
from benchmarks.timing import environment, wait_for
from dsa_jax import presets
from dsa_jax.config import ModelConfig, Numerics
from dsa_jax.mla import Mode
from pallas_kernels import Selection, dispatch
from train.config import TrainConfig
from train.flops import step_work
from train.optimizer import make_optimizer
from train.stages import Stage, split
from train.state import Params, Skeleton, TrainState, new_state, skeleton_of

# Names of kernels, in the order in which they are looked for, and whose time they are.
OPS = (
    ("dense_attention_d", "dense attention, backward"),
    ("dense_attention", "dense attention, forward"),
    ("indexer_target", "indexer's KL"),
    ("indexer_gradient", "indexer's KL"),
    ("indexer_loss", "indexer's KL"),
    ("indexer_scores", "indexer's scores"),  # of the selection, and in warm-up of the KL
    ("topk", "top-k"),
    ("sparse_attention_forward", "sparse attention, forward"),
    ("sparse_attention_", "sparse attention, backward"),
    ("grouped_matmul", "experts' matmuls"),
    ("nvjet", "other matmuls"),
    ("cutlass", "other matmuls"),
    ("gemm", "other matmuls"),
)


class Case(NamedTuple):
    """One row of the results."""

    stage: Stage
    tokens: int
    kernels: bool = True

    @property
    def name(self) -> str:
        """`warmup 131072`, `sparse 8192 by xla`."""
        return f"{self.stage.value} {self.tokens}" + ("" if self.kernels else " by xla")


CASES = (
    Case(Stage.SPARSE, 8192),
    Case(Stage.DENSE, 8192),
    Case(Stage.SPARSE, 8192, kernels=False),
    Case(Stage.SPARSE, 32768),
    Case(Stage.DENSE, 32768),
    Case(Stage.SPARSE, 32768, kernels=False),
    Case(Stage.WARMUP, 32768),
    Case(Stage.WARMUP, 32768, kernels=False),
    Case(Stage.WARMUP, 131_072),
)


def layer_config(experts: int = 16, experts_of_a_token: int = 8) -> ModelConfig:
    """A model of one layer; the vocabulary only feeds it."""
    return presets.get("deepseek-v3.2-exp").replace(
        num_hidden_layers=1, first_k_dense_replace=0, vocab_size=256, n_routed_experts=experts,
        num_experts_per_tok=experts_of_a_token, n_group=1, topk_group=1, fp8_weights=None,
        numerics=Numerics(), tie_word_embeddings=True, num_nextn_predict_layers=0,
    )  # fmt: skip


def train_config(case: Case, model: ModelConfig, **changes: Any) -> TrainConfig:
    """The stage with its published rates; one sequence a step, nothing recomputed."""
    if case.stage is Stage.DENSE:
        model = model.without_indexer()
    config = TrainConfig(
        stage=case.stage, model=model, batch_size=1, sequence_length=case.tokens, remat="none"
    )
    return dataclasses.replace(config, **changes).resolved()


class Outcome(NamedTuple):
    """What a layer hands on.

    Attributes:
        hidden: its output.
        below: gradient of its input; None in warm-up, which has no backward pass.
        kl: the indexer's loss; None without an indexer.
        selection: the keys attended to; None under dense attention.
    """

    hidden: jax.Array
    below: jax.Array | None
    kl: jax.Array | None
    selection: Selection | None


def gradients(
    config: TrainConfig,
    skeleton: Skeleton,
    params: Params,
    h: jax.Array,
    above: jax.Array,
    selected: Selection | None = None,
) -> tuple[Params, Outcome]:
    """Gradients of what the stage trains.

    Args:
        config: a resolved config.
        skeleton: of the model.
        params: all parameters.
        h: fp32 `[1, T, D]`, the residual sum that enters the layer.
        above: bf16 `[1, T, D]`, the gradient that arrives from the layers above.
        selected: keys to attend to; None: the indexer's.
    """
    stage = config.stage
    sparse = stage.attention == "sparse"
    selector = None if selected is None else lambda state: selected
    mode = Mode(stage.attention, stage.indexer_loss, selector, None, select=sparse)
    trainable, frozen = split(params, stage.trainable)

    def loss(trainable: Params, h: jax.Array) -> tuple[jax.Array, Any]:
        model = skeleton.model({**frozen, **trainable})
        rows = model.rows(jnp.zeros(h.shape[:2], jnp.int32))
        block = jax.tree.map(lambda x: x[0], model.stacks[0].blocks[0])
        out = block(h, rows, mode, jnp.int32(0))
        total = jnp.float32(0)
        if stage.lm_loss:
            # Only once the layer has run, or what it makes of the gradient would be computed first.
            _, late = lax.optimization_barrier((out.h, above))
            total += jnp.sum(out.h * late, dtype=jnp.float32)
        if out.kl is not None:
            total += out.kl
        return total, (out.h, out.kl, out.selection)

    which = (0, 1) if stage.lm_loss else (0,)
    (_, (hidden, kl, chosen)), found = jax.value_and_grad(loss, which, has_aux=True)(trainable, h)
    return found[0], Outcome(hidden, found[1] if stage.lm_loss else None, kl, chosen)


def make_step(config: TrainConfig, skeleton: Skeleton) -> Callable:
    """`(state, h, above) -> (state, outcome)`."""
    optimizer = make_optimizer(config)

    def step(state: TrainState, h: jax.Array, above: jax.Array) -> tuple[TrainState, Outcome]:
        found, outcome = gradients(config, skeleton, state.params, h, above)
        trainable, _ = split(state.params, config.stage.trainable)
        updates, opt_state = optimizer.update(found, state.opt_state, trainable)
        params = {**state.params, **optax.apply_updates(trainable, updates)}  # pyright: ignore
        return TrainState(state.step + 1, params, opt_state, state.ok), outcome

    return step


def draw(config: TrainConfig, seed: int = 0) -> tuple[Params, jax.Array, jax.Array]:
    """Fresh parameters, a random input and a random gradient from above, made on the device."""
    key = jax.random.key(seed, impl="rbg")  # a billion weights: compiled and drawn the sooner
    # A gradient of about this size per token keeps the loss an average over tokens.
    shape = (1, config.sequence_length or 0, config.model.hidden_size)
    h = jax.random.normal(jax.random.fold_in(key, 1), shape)
    above = jax.random.normal(jax.random.fold_in(key, 2), shape, jnp.bfloat16) / shape[1]

    def parameter(number: int, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if "norm" in path or path.endswith("bias"):
            return jnp.full(leaf.shape, float(path.endswith("weight")), leaf.dtype)
        std = config.model.initializer_range
        return std * jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)

    shapes = skeleton_of(config).shapes
    return (
        {path: parameter(i, path, leaf) for i, (path, leaf) in enumerate(shapes.items(), 3)},
        h,
        above,
    )


def prepare(config: TrainConfig, seed: int = 0) -> tuple[TrainState, jax.Array, jax.Array]:
    """`draw` with a fresh optimizer."""
    params, h, above = draw(config, seed)
    return new_state(config, params, make_optimizer(config)), h, above


# --- time and memory ------------------------------------------------------------------------------


def lower(case: Case, config: TrainConfig) -> tuple[Any, dict[str, str]]:
    """The step for shapes alone, and which implementation serves each of its ops."""
    step = jax.jit(make_step(config, skeleton_of(config)), donate_argnums=0)
    shapes = jax.eval_shape(functools.partial(prepare, config))
    with dispatch.kernels(case.kernels), dispatch.recorded() as chosen:
        return step.trace(*shapes).lower(lowering_platforms=("cuda",)), chosen


def compile_(lowered: Any) -> Any:
    """Without Triton's candidates for matmuls, which take long to compile and do not win here."""
    return lowered.compile({"xla_gpu_enable_triton_gemm": False})


def needed(config: TrainConfig) -> dict[str, float]:
    """TFLOP of a step that the model needs, by part; the head is not part of the layer."""
    parts = {part.name: part.forward + part.backward for part in step_work(config)}
    return {name: round(flop / 1e12, 2) for name, flop in parts.items() if name != "head"}


def compile_inputs(config: TrainConfig) -> Any:
    """`prepare`, compiled."""
    return jax.jit(functools.partial(prepare, config)).lower().compile()


def memory(compiled: Any) -> dict[str, float]:
    """What the compiled program needs, GiB."""
    found = compiled.memory_analysis()
    sizes = {"arguments": found.argument_size_in_bytes, "temporary": found.temp_size_in_bytes}
    sizes["outputs"] = found.output_size_in_bytes - found.alias_size_in_bytes
    return {f"{name}_gib": round(size / 2**30, 2) for name, size in sizes.items()}


def shares(kernels: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of each op, the largest first; what no name tells is `the rest`."""
    found: dict[str, float] = {}
    for name, ms in kernels.items():
        op = next((op for part, op in OPS if part in name), "the rest")
        found[op] = found.get(op, 0.0) + ms
    return {op: round(ms, 3) for op, ms in sorted(found.items(), key=lambda item: -item[1])}


def keep_profile(folder: Path, case: Case, run: Sequence[tuple[str, float]]) -> None:
    """Writes `CASE.txt`: milliseconds, launches and name of each kernel, the longest first."""
    folder.mkdir(parents=True, exist_ok=True)
    launches = collections.Counter(name for name, _ in run)
    total: dict[str, float] = {}
    for name, ms in run:
        total[name] = total.get(name, 0.0) + ms
    lines = [f"{ms:9.3f} {launches[name]:5d} {name}" for name, ms in total.items()]
    text = "\n".join(sorted(lines, reverse=True)) + "\n"
    (folder / f"{case.name.replace(' ', '_')}.txt").write_text(text)


class _Steps(jax.stages.Wrapped):
    """The compiled step, called again and again on the state it leaves, each call timed."""

    def __init__(self, compiled: Any, state: TrainState):
        self.compiled, self.state = compiled, state
        self.seconds: list[float] = []

    def __call__(self, h: jax.Array, above: jax.Array) -> jax.Array | None:
        began = time.perf_counter()
        self.state, outcome = self.compiled(self.state, h, above)
        jax.block_until_ready(self.state)
        self.seconds.append(time.perf_counter() - began)
        return outcome.kl

    def trace(self, *args, **kwargs):
        raise NotImplementedError

    def lower(self, *args, **kwargs):
        raise NotImplementedError


def measure(
    case: Case,
    config: TrainConfig,
    programs: tuple[Any, Any],
    repeats: int = 2,
    profile: Path | None = None,
) -> dict[str, Any]:
    """Time of a step on the host's clock, and of its kernels by CUPTI.

    Args:
        case: what is measured.
        config: of it.
        programs: its step and `prepare`, compiled.
        repeats: steps whose median counts, after one that loads the program; the first of them is
            profiled.
        profile: a folder for every kernel's time.
    """
    work = needed(config)
    compiled, make = programs
    state, h, above = make()
    steps = _Steps(compiled, jax.block_until_ready(state))
    del state
    say(f"{case.name} has its weights")
    _, run = profiler.measure(steps, aggregate=False)(h, above)
    if run is None:
        raise RuntimeError("CUPTI saw no kernel: layer_step needs an NVIDIA GPU")
    kernels: dict[str, float] = {}
    for name, ms in run:
        kernels[name] = kernels.get(name, 0.0) + ms
    if profile is not None:
        keep_profile(profile, case, run)
    for _ in range(repeats - 1):
        steps(h, above)
    seconds = statistics.median(steps.seconds[1:])
    rest = sorted(
        ((ms, name) for name, ms in kernels.items() if not any(part in name for part, _ in OPS)),
        reverse=True,
    )
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "ms": round(1e3 * seconds, 2),
        "tokens_per_second": round(case.tokens / seconds),
        "tflops": round(sum(work.values()) / seconds, 1),
        "device_ms": round(sum(kernels.values()), 2),
        "needed_tflop": work,
        "ops_ms": shares(kernels),
        "rest_ms": {name[:48]: round(ms, 2) for ms, name in rest[:6]},
        "peak_gib_of_process": round(stats.get("peak_bytes_in_use", 0) / 2**30, 2),
    }


def say(text: str) -> None:
    """To stderr: results go to stdout."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Runs the cases that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="*", choices=names, default=names, metavar="CASE")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--experts-of-a-token", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", type=Path, metavar="FOLDER")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="of all processes on the GPU")
    options = parser.parse_args()
    model = layer_config(options.experts, options.experts_of_a_token)
    few = f", {model.num_experts_per_tok} of {model.n_routed_experts} experts"
    suffix = "" if model == layer_config() else few
    results = Results(options.json)
    results.runs.append({"environment": environment()})
    print(json.dumps(results.runs[-1]), flush=True)

    def add(row: dict[str, Any]) -> None:
        results.add(row)
        print(json.dumps(row), flush=True)

    # Tracing holds the interpreter, compiling does not: all programs compile side by side.
    cases = [case for case in CASES if case.name in options.cases]
    configs = [train_config(case, model) for case in cases]
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(compile_inputs, config) for config in configs]
        compiled = []
        for case, config in zip(cases, configs, strict=True):
            lowered, chosen = lower(case, config)
            say(f"{case.name} lowered")
            compiled.append((pool.submit(compile_, lowered), chosen))
        concurrent.futures.wait([*made, *(step for step, _ in compiled)])
        wait_for(options.lock)
        for case, config, make, (step, chosen) in zip(cases, configs, made, compiled, strict=True):
            row = {"op": "layer_step", "kind": case.name + suffix, "keys": case.tokens}
            row |= {"implementations": chosen, **memory(step.result())}
            say(f"{case.name} compiled: {memory(step.result())}")
            programs = step.result(), make.result()
            add(row | measure(case, config, programs, profile=options.profile))


if __name__ == "__main__":
    main()
