"""`python -m train plan` against one real GPU: memory, operations and time of real-shaped steps.

    python -m benchmarks.plan_check predict --case sparse-8k --json FILE --programs FOLDER
    python -m benchmarks.plan_check measure --case sparse-8k --json FILE --programs FOLDER
    ncu COUNTERS python -m benchmarks.plan_check count --case sparse-8k --json FILE
    python -m benchmarks.plan_check add --case sparse-8k --json FILE --from OTHER
    python -m benchmarks.plan_check show --json FILE

A case is a whole training step of DeepSeek-V3.2-Exp with fewer layers and experts and a vocabulary
of 16,384, everything else as it is. `predict` plans it without a GPU and keeps the program that was
compiled for the absent one. `measure` runs that program on one GPU and reads the allocator's peak
and the clock, or without `--programs` compiles the step where the GPU is; `--profile` lists its
kernels. `count` runs steps for NVIDIA's profiler (`benchmarks/tensor_operations.py` reads what
that counted). `add` takes a case over from another such file. Peaks are of a process, so a process
takes one case.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import fcntl
import json
import pickle
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable
from jax.experimental.mosaic.gpu import profiler

from dsa_jax import presets
from dsa_jax.config import ModelConfig, Numerics
from dsa_jax.sharding import make_mesh
from train.config import TrainConfig
from train.flops import step_work
from train.optimizer import make_optimizer
from train.plan import PlanOptions, counted, hlo, search
from train.plan.compiled import compile_step
from train.plan.options import train_config
from train.plan.report import assemble, counted_products
from train.plan.worker import lower
from train.stages import Stage
from train.state import TrainState, new_state, skeleton_of

GpuName = Literal["h100", "h200"]


class Case(NamedTuple):
    """A step: so many layers with so many experts, so many sequences one after the other."""

    stage: Stage
    layers: int
    experts: int
    tokens: int
    sequences: int


CASES = {
    "sparse-8k": Case(Stage.SPARSE, 1, 16, 8192, 2),
    "sparse-8k-once": Case(Stage.SPARSE, 1, 16, 8192, 1),
    "sparse-8k-2layers": Case(Stage.SPARSE, 2, 16, 8192, 2),
    "sparse-32k": Case(Stage.SPARSE, 1, 16, 32768, 1),
    "dense-32k": Case(Stage.DENSE, 1, 16, 32768, 1),
    "warmup-64k": Case(Stage.WARMUP, 2, 32, 65536, 1),
    # Two layers: what comes behind the last layer's attention is dead code in warm-up.
    "warmup-128k": Case(Stage.WARMUP, 2, 16, 131_072, 1),
}


def model_of(case: Case) -> ModelConfig:
    """The published shape with fewer layers, experts and words."""
    return presets.get("deepseek-v3.2-exp").replace(
        num_hidden_layers=case.layers, first_k_dense_replace=0, vocab_size=16384,
        n_routed_experts=case.experts, n_group=1, topk_group=1, fp8_weights=None,
        numerics=Numerics(), num_nextn_predict_layers=0,
    )  # fmt: skip


def planned(case: Case, gpu: GpuName) -> tuple[PlanOptions, TrainConfig]:
    """What is asked of the plan, and the run that it means."""
    options = PlanOptions(
        stage=case.stage, devices=1, gpu=gpu, sequence_length=case.tokens,
        batch_size=case.sequences, steps=10, compile="cuda",
    ).resolved()  # fmt: skip
    return options, train_config(options, model_of(case), options.mesh)


def predict(case: Case, gpu: GpuName, program: Path | None) -> dict[str, Any]:
    """What the plan says, compiled without a GPU and counted.

    Args:
        case: what to plan.
        gpu: for what.
        program: where to keep the compiled program; None: nowhere.
    """
    options, config = planned(case, gpu)
    candidate = search.count(options, config, counted.shapes_of(config))
    raw = program and program.with_suffix(".raw")
    compiled = compile_step(
        config, options.hardware, "cuda", lambda phase: print(phase, flush=True), program=raw
    )
    if program is not None and raw is not None:
        packed = base64.b64encode(zlib.compress(raw.read_bytes())).decode()
        program.write_text(json.dumps({"program": packed}))
        raw.unlink()
    report = assemble(options, candidate, compiled, [])
    return {
        "bytes": report.bytes,
        "counted_bytes": candidate.bytes,
        "memory": compiled.memory,
        "dot_flop": compiled.work.dot_flop,
        "other_bytes": compiled.work.other_bytes,
        "counted_products": counted_products(config),
        "flop": {part.name: part.total * case.sequences for part in step_work(config)},
        "step_seconds": report.estimate.step,
        "implementations": compiled.implementations,
    }


def _load(program: Path) -> Any:
    packed = json.loads(program.read_text())["program"]
    payload = pickle.loads(zlib.decompress(base64.b64decode(packed)))
    return serialize_executable.deserialize_and_load(*payload, execution_devices=jax.devices()[:1])


def _take_turn(turn: Path | None) -> TextIO | None:
    """Waits until no other process is on the GPU; what comes back keeps it until this one ends."""
    if turn is None:
        return None
    lock = turn.open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    time.sleep(0.5)  # the last one's memory is on its way back
    return lock


class Running(jax.stages.Wrapped):
    """A step on this machine's GPU, called again and again on the state that it leaves."""

    def __init__(self, case: Case, gpu: GpuName, program: Path | None, turn: Path | None):
        _, config = planned(case, gpu)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            if program is not None:
                self.compiled = _load(program)
            else:
                self.compiled = lower(config, mesh, kernels=True).compile()
            make = jax.jit(lambda: inputs(config)).lower().compile()
            _say(f"have the programs after {time.perf_counter() - began:.1f} s")
            self.turn = _take_turn(turn)
            self.state, self.batch = jax.block_until_ready(make())
        self.metrics: dict[str, jax.Array] = {}
        self.seconds: list[float] = []

    def __call__(self) -> jax.Array:
        start = time.perf_counter()
        self.state, self.metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, self.metrics))
        self.seconds.append(time.perf_counter() - start)
        _say(f"step of {self.seconds[-1]:.3f} s, loss {float(self.metrics['loss']):.4f}")
        return self.metrics["loss"]

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def measure(
    case: Case,
    gpu: GpuName,
    program: Path | None,
    turn: Path | None = None,
    steps: int = 3,
    profile: bool = False,
) -> dict[str, Any]:
    """The same step on this machine's GPU.

    Args:
        case: what to run.
        gpu: what it was planned for.
        program: what `predict` kept; None: compiled here.
        turn: a file whose lock says which of several processes has the GPU; None: there is one.
        steps: to time; the first of them, which loads kernels, does not count.
        profile: list the kernels of one more.
    """
    step = Running(case, gpu, program, turn)
    for _ in range(steps):
        step()
    # Before the profiler, which holds memory of its own.
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    memory = step.compiled.memory_analysis()
    assert memory is not None
    found = {
        "gpu": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "peak_bytes": peak,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        },
        "compiled": "without a GPU" if program is not None else "here",
        "dot_flop": hlo.work(hlo.parse(step.compiled.as_text() or "")).dot_flop,
        "step_seconds": statistics.median(step.seconds[1:]),
        "finite": bool(step.metrics["ok"]),
    }
    if profile:
        _, launches = profiler.measure(step, aggregate=False)()
        found["kernels"] = kernels(launches or [])
    return found


def kernels(launches: list[tuple[str, float]]) -> list[tuple[str, int, float]]:
    """Name, launches and milliseconds of each kernel, the longest first."""
    sums: dict[str, tuple[int, float]] = {}
    for name, ms in launches:
        count, total = sums.get(name, (0, 0.0))
        sums[name] = (count + 1, total + ms)
    found = [(name, count, round(ms, 3)) for name, (count, ms) in sums.items()]
    return sorted(found, key=lambda kernel: -kernel[2])


def count(case: Case, gpu: GpuName, program: Path | None, turn: Path | None, steps: int) -> None:
    """Runs some steps, the last between the calls that tell a profiler to listen."""
    step = Running(case, gpu, program, turn)
    for _ in range(steps - 1):
        step()
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuProfilerStart()
    step()
    driver.cuProfilerStop()


def inputs(config: TrainConfig) -> tuple[TrainState, dict[str, jax.Array]]:
    """A state fresh from a random draw, and a batch of random tokens."""
    key = jax.random.key(0, impl="rbg")  # a billion weights: compiled and drawn the sooner

    def draw(number: int, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if "norm" in path or path.endswith("bias"):
            return jnp.full(leaf.shape, float(path.endswith("weight")), leaf.dtype)
        std = config.model.initializer_range
        return std * jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)

    shapes = skeleton_of(config).shapes
    params = {path: draw(i, path, leaf) for i, (path, leaf) in enumerate(shapes.items(), 1)}
    shape = (config.batch_size or 0, config.sequence_length or 0)
    tokens = jax.random.randint(key, shape, 0, config.model.vocab_size, jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "positions": jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
    }
    return new_state(config, params, make_optimizer(config)), batch


def compare(row: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Name, prediction, measurement, relative difference."""
    said, seen = row["predicted"], row.get("measured")
    pairs = []
    if seen is not None:
        pairs += [
            ("peak memory, GB: compiled without a GPU", said["bytes"], seen["peak_bytes"]),
            ("peak memory, GB: counted", said["counted_bytes"], seen["peak_bytes"]),
            ("XLA's products, TFLOP: counted", said["counted_products"], seen["dot_flop"]),
            ("step, s", said.get("step_seconds", float("nan")), seen["step_seconds"]),
        ]
    if "tensor_flop" in row:
        pairs.append(
            ("all, TFLOP: counted", sum(said["flop"].values()), sum(row["tensor_flop"].values()))
        )
    return [(name, a, b, a / b - 1) for name, a, b in pairs]


def show(rows: dict[str, Any]) -> None:
    """Prints the comparisons."""
    for name, row in rows.items():
        if "predicted" not in row:
            continue
        for what, said, seen, difference in compare(row):
            unit = 1e9 if "GB" in what else 1e12 if "TFLOP" in what else 1.0
            print(
                f"{name:24} {what:40} {said / unit:9.3f} {seen / unit:9.3f} {difference:+7.1%}",
                flush=True,
            )


def add(rows: dict[str, Any], name: str, other: Path | None) -> None:
    """Takes over what another file has of a row: what was predicted, measured or counted."""
    if other is None:
        raise SystemExit("add: say --from which file")
    rows[name] = rows.get(name, {}) | json.loads(other.read_text())[name]


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    """Predicts, or measures and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("predict", "measure", "count", "add", "show"))
    parser.add_argument("--from", type=Path, dest="other", metavar="OTHER", help="of `add`")
    parser.add_argument("--case", choices=CASES, default="sparse-8k")
    parser.add_argument("--gpu", default="h100", choices=("h100", "h200"))
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--programs", type=Path, metavar="FOLDER")
    parser.add_argument("--turn", type=Path, metavar="FILE", help="processes take turns by it")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    rows = json.loads(given.json.read_text()) if given.json.exists() else {}
    name, case = f"{given.case} {given.gpu}", CASES[given.case]
    program = given.programs and given.programs / f"{given.case}_{given.gpu}.json"
    acts: dict[str, Callable[[], Any]] = {
        "predict": lambda: _put(rows, name, "predicted", predict(case, given.gpu, program)),
        "measure": lambda: _put(
            rows,
            name,
            "measured",
            measure(case, given.gpu, program, given.turn, given.steps, given.profile),
        ),
        "count": lambda: count(case, given.gpu, program, given.turn, given.steps),
        "add": lambda: add(rows, name, given.other),
        "show": lambda: None,
    }
    acts[given.what]()
    show(rows if given.what == "show" else {name: rows.get(name, {})})
    if given.what in ("predict", "measure", "add"):
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


def _put(rows: dict[str, Any], name: str, what: str, found: dict[str, Any]) -> None:
    for kernel, launches, ms in found.get("kernels", [])[:40]:
        print(f"{ms:10.3f} ms {launches:6} x {kernel[:100]}", flush=True)
    rows.setdefault(name, {})[what] = found


if __name__ == "__main__":
    main()
