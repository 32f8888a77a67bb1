"""Both stages of training on two GPUs of one host, against one: losses, speed, communication.

    python -m benchmarks.two_gpus --json FILE
    python -m benchmarks.two_gpus --tiny --json FILE       # the same on two CPU devices

Three parts:

- `small`: a model that one GPU holds too, by fsdp 2, expert 2 and context 2. The losses of the
  first steps are compared with those of one GPU, and so is the speed: scaling efficiency is the
  time of a step on one GPU over twice that on two.
- `checkpoint`: a state saved on two GPUs and resumed on one; both take one more step.
- `large`: a model whose training state is larger than one GPU.

Each row of the result has the wall time of a step, and what CUPTI saw of one: the time in NCCL's
kernels and in all others, a GPU's mean. Communication is exposed where a step takes longer than
the other kernels do; launch gaps count as exposed too.

All programs of a part are compiled before its first one runs, side by side and without autotuning,
which would take longer than all runs together. None is loaded while another runs: loading waits for
the GPU, and a collective on it for the other GPU's, which may wait for the loading.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

FLAGS = (
    "--xla_gpu_autotune_level=0",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_enable_latency_hiding_scheduler=true",
)


def _prepare(tiny: bool) -> None:
    """Environment that JAX reads when it starts."""
    if tiny:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
        )
        return
    os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", "")))
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"  # or large buffers find no place
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"


_prepare("--tiny" in sys.argv)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402

from benchmarks.timing import environment  # noqa: E402
from dsa_jax import presets  # noqa: E402
from dsa_jax.config import ModelConfig  # noqa: E402
from dsa_jax.sharding import MeshConfig, batch_spec, make_mesh  # noqa: E402
from train.checkpoints import Checkpoints, RunRecord  # noqa: E402
from train.config import TrainConfig, to_dict  # noqa: E402
from train.data import Batch, DataPosition  # noqa: E402
from train.loop import trace_step  # noqa: E402
from train.stages import Stage  # noqa: E402
from train.start import Plan, plan, start  # noqa: E402
from train.state import TrainState, new_state  # noqa: E402

MESHES: dict[str, MeshConfig] = {
    "one": MeshConfig(),
    "fsdp 2": MeshConfig(fsdp=2),
    "expert 2": MeshConfig(expert=2),
    "context 2": MeshConfig(context=2),
}
STAGES = (Stage.SPARSE, Stage.WARMUP)
_KEY = (0, 0)


class Sizes(NamedTuple):
    """The models, and a batch."""

    small: ModelConfig
    large: ModelConfig
    batch: int
    length: int


def sizes(tiny: bool) -> Sizes:
    """Layers of DeepSeek-V3.2-Exp at 4096 wide, with fewer and narrower experts.

    Attention and indexer have its sizes but for `index_topk`. Masters, AdamW and gradients of the
    large one take 16 bytes for each of 6.2e9 parameters, and a step's temporaries about as much
    again: more than an H200 has.
    """
    if tiny:
        small = presets.get("tiny").replace(num_hidden_layers=2)
        return Sizes(small, small.replace(num_hidden_layers=3), 2, 32)
    layer = presets.get("deepseek-v3.2-exp").replace(
        hidden_size=4096,
        vocab_size=32768,
        intermediate_size=8192,
        moe_intermediate_size=2048,
        first_k_dense_replace=1,
        num_experts_per_tok=4,
        index_topk=1024,
        num_nextn_predict_layers=0,
    )
    small = layer.replace(num_hidden_layers=3, n_routed_experts=16)
    return Sizes(small, layer.replace(num_hidden_layers=6, n_routed_experts=40), 2, 8192)


class Program(NamedTuple):
    """One stage of one model on one mesh, compiled.

    Attributes:
        plan: shapes and shardings.
        init: makes a state.
        step: takes a step.
    """

    plan: Plan
    init: jax.stages.Compiled
    step: jax.stages.Compiled


def train_config(model: ModelConfig, stage: Stage, mesh: MeshConfig, given: Sizes) -> TrainConfig:
    """What a run of the stage would be configured as."""
    return TrainConfig(
        stage=stage,
        model=model,
        mesh=mesh,
        batch_size=given.batch,
        sequence_length=given.length,
        steps=1000,
    ).resolved()


def make_batch(given: Sizes, vocab: int, mesh: Mesh) -> Batch:
    """Rows of three documents and some padding."""
    shape = (given.batch, given.length)
    tokens = np.random.default_rng(0).integers(2, vocab, shape, dtype=np.int32)
    ends = [given.length // 2 + 3, given.length // 2 + given.length // 3, given.length - 5]
    place = np.arange(given.length)
    document = np.searchsorted(ends, place, side="right")
    starts = np.array([0, *ends])[document]
    inside = (document < 3) & (np.append(document[1:], 3) == document)
    batch = {
        "tokens": tokens,
        "targets": np.where(inside, np.roll(tokens, -1, axis=1), -1).astype(np.int32),
        "segment_ids": np.tile(np.where(document < 3, document + 1, 0), (given.batch, 1)),
        "positions": np.tile(place - starts, (given.batch, 1)),
    }
    where = NamedSharding(mesh, batch_spec())
    return {name: jax.device_put(x.astype(np.int32), where) for name, x in batch.items()}


def _fill(path: str, number: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Numbers that look random and are the same on every mesh, and cheap to compile."""
    index = jnp.full(like.shape, number * 7919, jnp.uint32)
    for axis, stride in enumerate(np.cumprod([1, *like.shape[:0:-1]])[::-1]):
        index += jax.lax.broadcasted_iota(jnp.uint32, like.shape, axis) * jnp.uint32(stride % 2**32)
    for factor, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):
        index = (index ^ (index >> shift)) * jnp.uint32(factor)
    noise = (index >> 8).astype(jnp.float32) * 2**-23 - 1
    if path.endswith("norm/weight"):
        return (1 + 0.1 * noise).astype(like.dtype)
    fan_in = like.shape[-2] if like.ndim > 1 else 100
    return (1.7 * fan_in**-0.5 * noise).astype(like.dtype)


def trace(config: TrainConfig) -> tuple[Plan, jax.stages.Lowered, jax.stages.Lowered]:
    """The plan of a run, and its initialiser and step before they are compiled."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = plan(config, mesh)

        def init() -> TrainState:
            params = {
                path: _fill(path, number, shape)
                for number, (path, shape) in enumerate(run.skeleton.shapes.items())
            }
            return new_state(config, params, run.optimizer)

        where = jax.tree.map(lambda x: x.sharding, run.state)
        return run, jax.jit(init, out_shardings=where).lower(), trace_step(run).lower()


class _Stepping(jax.stages.Wrapped):
    """Steps as a function without arguments, for the profiler."""

    def __init__(self, step: Callable, state: TrainState, batch: Batch):
        self.step, self.state, self.batch = step, state, batch

    def __call__(self) -> dict[str, jax.Array]:
        self.state, metrics = self.step(self.state, self.batch)
        return metrics

    def trace(self, *args, **kwargs):
        raise NotImplementedError

    def lower(self, *args, **kwargs):
        raise NotImplementedError


def profile(stepping: _Stepping, devices: int) -> dict[str, float]:
    """Milliseconds a GPU spends in NCCL's and in other kernels in a step; empty without CUPTI."""
    if jax.default_backend() != "gpu":
        return {}
    from jax.experimental.mosaic.gpu import profiler

    _, kernels = profiler.measure(stepping, aggregate=False)()
    if not kernels:
        return {}
    times = {"communication_ms": 0.0, "compute_ms": 0.0}
    for name, ms in kernels:  # pyright: ignore[reportGeneralTypeIssues]
        moves = any(word in name.lower() for word in ("nccl", "raggedalltoall", "ragged_all"))
        times["communication_ms" if moves else "compute_ms"] += ms / devices
    return times


def measure(program: Program, given: Sizes, steps: int) -> dict[str, Any]:
    """Losses, wall time, profile and memory of a program."""
    mesh, config = program.plan.mesh, program.plan.config
    with jax.set_mesh(mesh):
        batch = make_batch(given, config.model.vocab_size, mesh)
        stepping = _Stepping(program.step, program.init(), batch)
        losses, seconds = [], []
        for _ in range(steps):
            began = time.perf_counter()
            metrics = jax.device_get(stepping())
            seconds.append(time.perf_counter() - began)
            losses.append(float(metrics["loss"]))
        row: dict[str, Any] = {
            "losses": losses,
            "step_ms": 1e3 * min(seconds[1:]),
            "tokens_per_second": given.batch * given.length / min(seconds[1:]),
        }
        row |= profile(stepping, mesh.size)
    if "compute_ms" in row:
        row["communication_share"] = row["communication_ms"] / row["step_ms"]
        row["exposed_share"] = max(0.0, 1 - row["compute_ms"] / row["step_ms"])
    memory: Any = program.step.memory_analysis()
    peak = (mesh.devices.flat[0].memory_stats() or {}).get("peak_bytes_in_use")
    return row | {
        "parameters": sum(math.prod(x.shape) for x in program.plan.skeleton.shapes.values()),
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "peak_gb_so_far": None if peak is None else peak / 1e9,
        "finite": bool(np.isfinite(losses).all()),
    }


def resumed(two: Program, one: Program, given: Sizes) -> dict[str, Any]:
    """Saves on two devices, resumes on one, and lets both go on."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        config = two.plan.config
        with jax.set_mesh(two.plan.mesh):
            batch = make_batch(given, config.model.vocab_size, two.plan.mesh)
            state, _ = two.step(two.init(), batch)
            checkpoints = Checkpoints(Path(folder), config.model, 1)
            began = time.perf_counter()
            position = DataPosition(given.batch, given.length, {})
            checkpoints.save(1, state, RunRecord(to_dict(config), position, _KEY))
            checkpoints.wait()
            rows["save_seconds"] = time.perf_counter() - began
            saved = jax.device_get(state)
            _, metrics = two.step(state, batch)
            rows["loss_on_two"] = float(metrics["loss"])
        with jax.set_mesh(one.plan.mesh):
            began = time.perf_counter()
            state = start(one.plan, checkpoints).state
            rows["restore_seconds"] = time.perf_counter() - began
            checkpoints.close()
            equal = jax.tree.map(np.array_equal, saved, jax.device_get(state))
            rows["bit_equal"] = all(jax.tree.leaves(equal))
            batch = make_batch(given, config.model.vocab_size, one.plan.mesh)
            rows["loss_on_one"] = float(one.step(state, batch)[1]["loss"])
    rows["relative_difference"] = abs(rows["loss_on_one"] / rows["loss_on_two"] - 1)
    return rows


class Case(NamedTuple):
    """One program."""

    model: str
    stage: Stage
    mesh: str

    @property
    def name(self) -> str:
        """`small sparse fsdp 2`."""
        return f"{self.model} {self.stage.value} {self.mesh}"


# Once it has run, so has all that the checkpoint needs.
_LAST_SMALL = Case("small", Stage.WARMUP, "fsdp 2")


def cases(parts: Sequence[str]) -> list[Case]:
    """What is to be compiled, in the order in which it is run."""
    small = [Case("small", stage, mesh) for stage in STAGES for mesh in MESHES]
    if "small" not in parts:
        wanted = (_LAST_SMALL.mesh, "one") if "checkpoint" in parts else ()
        small = [Case("small", _LAST_SMALL.stage, mesh) for mesh in wanted[::-1]]
    # What needs both GPUs, the sparse stage, first.
    large = [Case("large", stage, mesh) for stage in STAGES for mesh in reversed(MESHES)]
    large = [case for case in large if case.mesh != "one"]
    return small + (large if "large" in parts else [])


class Report:
    """Rows as they come, on stdout and on disk: a run that is cut off leaves what it had."""

    def __init__(self, path: Path | None):
        self.path, self.began = path, time.perf_counter()
        self.rows: dict[str, Any] = {"environment": environment(), "flags": FLAGS, "cases": {}}

    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.began

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Adds a row."""
        self.rows["cases"][name] = row
        print(f"{self.seconds():6.1f} s  {name}: {json.dumps(row)}", flush=True)
        if self.path is not None:
            draft = self.path.with_suffix(".part")
            draft.write_text(json.dumps(self.rows, indent=1))
            draft.replace(self.path)


def compare(row: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """A row on two devices beside that on one."""
    differences = [abs(a / b - 1) for a, b in zip(row["losses"], one["losses"], strict=True)]
    return row | {
        "loss_differences": differences,
        "scaling_efficiency": one["step_ms"] / (2 * row["step_ms"]),
    }


def main() -> int:
    """Runs the parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_gpus", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="two CPU devices, tiny models")
    parser.add_argument("--parts", nargs="+", default=["small", "checkpoint", "large"])
    parser.add_argument("--steps", type=int, default=4, help="of each program, the first untimed")
    parser.add_argument("--seconds", type=float, default=115, help="begin nothing after these")
    options = parser.parse_args()
    if jax.device_count() < 2:
        print(f"two devices are needed, there is {jax.device_count()}", file=sys.stderr)
        return 2
    faulthandler.dump_traceback_later(60, repeat=True)  # says where it hangs, should it hang
    given, report = sizes(options.tiny), Report(options.json)
    todo = cases(options.parts)
    pool = ThreadPoolExecutor(max_workers=2 if options.tiny else 8)
    done: dict[str, Program] = {}
    programs: dict[Case, Future[Program]] = {}
    for case in todo:
        if case not in programs:
            part = [other for other in todo if other.model == case.model]
            programs |= _compile_all(part, given, pool, report)
            wait(programs.values())
        program = programs[case]
        if report.seconds() > options.seconds:
            report.add(case.name, {"skipped": "out of time"})
            continue
        try:
            done[case.name] = program.result()
            if case.model in options.parts:
                row = measure(done[case.name], given, options.steps)
                one = report.rows["cases"].get(f"{case.model} {case.stage.value} one")
                report.add(case.name, compare(row, one) if one and case.mesh != "one" else row)
            if case.model == "large" or case.stage is Stage.SPARSE:
                del done[case.name]
        except Exception as error:  # the other cases still tell something
            report.add(case.name, {"failed": f"{type(error).__name__}: {str(error)[:2000]}"})
        if case == _LAST_SMALL:
            _checkpoint(options.parts, done, given, report)
    pool.shutdown(wait=False, cancel_futures=True)
    report.add("seconds", {"total": report.seconds()})
    return int(any("failed" in row for row in report.rows["cases"].values()))


def _checkpoint(
    parts: Sequence[str], done: dict[str, Program], given: Sizes, report: Report
) -> None:
    if "checkpoint" not in parts:
        return
    try:
        two, one = done["small warmup fsdp 2"], done["small warmup one"]
        report.add("checkpoint on two, resumed on one", resumed(two, one, given))
    except Exception as error:
        report.add("checkpoint", {"failed": f"{type(error).__name__}: {str(error)[:2000]}"})


def _compile_all(
    todo: Sequence[Case], given: Sizes, pool: ThreadPoolExecutor, report: Report
) -> dict[Case, Future[Program]]:
    """Traces in one thread, for Python has one at a time, and compiles in others."""
    programs: dict[Case, Future[Program]] = {case: Future() for case in todo}

    def finish(case: Case, run: Plan, init: Any, step: Any) -> None:
        try:
            programs[case].set_result(Program(run, init.compile(), step.compile()))
            print(f"{report.seconds():6.1f} s  {case.name}: compiled", flush=True)
        except BaseException as error:
            programs[case].set_exception(error)

    def trace_all() -> None:
        for case in todo:
            try:
                model = given.small if case.model == "small" else given.large
                config = train_config(model, case.stage, MESHES[case.mesh], given)
                pool.submit(finish, case, *trace(config))
                print(f"{report.seconds():6.1f} s  {case.name}: traced", flush=True)
            except BaseException as error:
                programs[case].set_exception(error)

    pool.submit(trace_all)
    return programs


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # compilations that nobody waits for any more cannot be stopped
