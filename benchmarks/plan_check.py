"""`python -m train plan` against one real GPU: memory, products and time of a real-shaped step.

    python -m benchmarks.plan_check predict --json FILE --program PROGRAM   # without a GPU
    python -m benchmarks.plan_check measure --json FILE --program PROGRAM   # on one GPU

One layer of DeepSeek-V3.2-Exp with 16 experts and a vocabulary of 16,384, everything else as it is;
two sequences of 8192 tokens, one after the other. `predict` plans the run and keeps the program
that was compiled for the absent GPU; `measure` runs that program and reads the allocator's peak,
or without `--program` compiles the same step where the GPU is.
"""

from __future__ import annotations

import argparse
import base64
import json
import pickle
import time
import zlib
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

from dsa_jax import presets
from dsa_jax.config import ModelConfig, Numerics
from dsa_jax.sharding import make_mesh
from train.plan import PlanOptions, counted, hlo, search
from train.plan.compiled import compile_step
from train.plan.options import train_config
from train.plan.report import assemble, counted_products
from train.plan.worker import lower
from train.stages import Stage
from train.start import plan

STEPS = 3


def small_model() -> ModelConfig:
    """One layer of the published shape that a single GPU can train."""
    return presets.get("deepseek-v3.2-exp").replace(
        num_hidden_layers=1, first_k_dense_replace=0, vocab_size=16384, n_routed_experts=16,
        n_group=1, topk_group=1, fp8_weights=None, numerics=Numerics(),
        num_nextn_predict_layers=0,
    )  # fmt: skip


def options(stage: str, gpu: Literal["h100", "h200"]) -> PlanOptions:
    """The run: two micro-batches of one sequence on one device."""
    return PlanOptions(
        stage=Stage(stage), devices=1, gpu=gpu, sequence_length=8192, batch_size=2, steps=10,
        compile="cuda",
    ).resolved()  # fmt: skip


def predict(stage: str, gpu: Literal["h100", "h200"], program: Path | None) -> dict[str, Any]:
    """What the plan says, compiled without a GPU and counted.

    Args:
        stage: what to plan.
        gpu: for what.
        program: where to keep the compiled program; None: nowhere.
    """
    asked = options(stage, gpu)
    config = train_config(asked, small_model(), asked.mesh)
    candidate = search.count(asked, config, counted.shapes_of(config))
    raw = program and program.with_suffix(".raw")
    compiled = compile_step(
        config, asked.hardware, "cuda", lambda phase: print(phase, flush=True), program=raw
    )
    if program is not None and raw is not None:
        packed = base64.b64encode(zlib.compress(raw.read_bytes())).decode()
        program.write_text(json.dumps({"program": packed}))
        raw.unlink()
    report = assemble(asked, candidate, compiled, [])
    return {
        "bytes": report.bytes,
        "counted_bytes": candidate.bytes,
        "memory": compiled.memory,
        "dot_flop": compiled.work.dot_flop,
        "counted_products": counted_products(config),
        "step_seconds": report.estimate.step,
        "implementations": compiled.implementations,
    }


def _unpacked(program: Path) -> bytes:
    return zlib.decompress(base64.b64decode(json.loads(program.read_text())["program"]))


def measure(stage: str, gpu: Literal["h100", "h200"], program: Path | None) -> dict[str, Any]:
    """The same step on this machine's GPU; `program` is what `predict` kept of it."""
    asked = options(stage, gpu)
    config = train_config(asked, small_model(), asked.mesh)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {what}", flush=True)

    with jax.set_mesh(mesh):
        run = plan(config, mesh)
        if program is not None:
            compiled = serialize_executable.deserialize_and_load(
                *pickle.loads(_unpacked(program)), execution_devices=jax.devices()[:1]
            )
        else:
            compiled = lower(config, mesh, kernels=True).compile()
        say("have the program")
        state, batch = jax.jit(lambda: _inputs(run.state, config))()
        jax.block_until_ready(state)
        say("made the state")
        seconds = []
        for _ in range(STEPS):
            start = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
            say(f"step of {seconds[-1]:.3f} s, loss {float(metrics['loss']):.4f}")
    memory = compiled.memory_analysis()
    assert memory is not None
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "gpu": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "peak_bytes": stats.get("peak_bytes_in_use", 0),
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        },
        "compiled": "without a GPU" if program is not None else "here",
        "dot_flop": hlo.work(hlo.parse(compiled.as_text() or "")).dot_flop,
        "step_seconds": min(seconds[1:]),
        "finite": bool(metrics["ok"]),
    }


def _inputs(shapes: Any, config: Any) -> Any:
    """A state and a batch of numbers that look random, by a program that compiles at once."""

    def leaf(s: jax.ShapeDtypeStruct) -> jax.Array:
        if s.dtype == jnp.bool_:
            return jnp.ones(s.shape, bool)
        if not jnp.issubdtype(s.dtype, jnp.floating):
            return jnp.zeros(s.shape, s.dtype)
        index = jax.lax.iota(jnp.float32, s.shape[-1]) if s.ndim else jnp.float32(0)
        for axis in range(s.ndim - 1):
            index = index + 0.7 * (axis + 2) * jax.lax.broadcasted_iota(jnp.float32, s.shape, axis)
        return (0.03 * jnp.sin(12.9898 * index) * jnp.ones(s.shape)).astype(s.dtype)

    state = jax.tree.map(leaf, shapes)
    # Second moments are squares.
    state = state._replace(opt_state=jax.tree.map(jnp.abs, state.opt_state))
    shape = (config.batch_size, config.sequence_length)
    place = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    tokens = (place * 7919 + 13) % config.model.vocab_size
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "positions": place,
        "segment_ids": jnp.ones(shape, jnp.int32),
    }
    return state, batch


def compare(row: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Name, prediction, measurement, relative difference."""
    said, seen = row["predicted"], row["measured"]
    sum_of = lambda memory: sum(memory.values())  # noqa: E731
    pairs = [
        ("peak memory, GB: compiled without a GPU", said["bytes"], seen["peak_bytes"]),
        ("peak memory, GB: counted", said["counted_bytes"], seen["peak_bytes"]),
        ("memory analysis, GB", sum_of(said["memory"]), sum_of(seen["memory"])),
        ("XLA's products, TFLOP: compiled", said["dot_flop"], seen["dot_flop"]),
        ("XLA's products, TFLOP: counted", said["counted_products"], seen["dot_flop"]),
        ("step, s", said["step_seconds"], seen["step_seconds"]),
    ]
    return [(name, a, b, a / b - 1) for name, a, b in pairs]


def show(row: dict[str, Any]) -> None:
    """Prints the comparison."""
    for name, said, seen, difference in compare(row):
        unit = 1e9 if "GB" in name else 1e12 if "TFLOP" in name else 1.0
        print(f"{name:42} {said / unit:9.3f} {seen / unit:9.3f} {difference:+7.1%}", flush=True)


def main() -> None:
    """Predicts, or measures and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("predict", "measure", "show"))
    parser.add_argument("--stage", default="sparse", choices=("sparse", "warmup", "dense"))
    parser.add_argument("--gpu", default="h100", choices=("h100", "h200"))
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--program", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    rows = json.loads(given.json.read_text()) if given.json.exists() else {}
    name = f"{given.stage} {given.gpu}"
    row = rows.setdefault(name, {})
    if given.what == "predict":
        row["predicted"] = predict(given.stage, given.gpu, given.program)
    elif given.what == "measure":
        row["measured"] = measure(given.stage, given.gpu, given.program)
    if "predicted" in row and "measured" in row:
        show(row)
    given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
