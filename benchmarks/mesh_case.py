"""One stage of training on one mesh of GPUs, as a process that `benchmarks.two_gpus` starts.

It compiles, prints `{"ready": ...}`, waits for a line on its standard input, runs, and prints
`{"row": ...}`. So many cases compile side by side, which takes most of the time, and each has the
GPUs to itself when it is timed. Nothing is loaded onto a GPU while a collective waits on it: a
program's kernels are there before its first step.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import json
import lzma
import math
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.two_gpus import Case
from dsa_jax import expert_parallel, presets
from dsa_jax.config import ModelConfig
from dsa_jax.sharding import MeshConfig, batch_spec, make_mesh
from pallas_kernels import dispatch
from train.checkpoints import Checkpoints, RunRecord
from train.config import TrainConfig, to_dict
from train.data import Batch, DataPosition
from train.loop import trace_step
from train.stages import Stage
from train.start import Plan, plan, start
from train.state import TrainState, new_state

MESHES: dict[str, MeshConfig] = {
    "one": MeshConfig(),
    "fsdp 2": MeshConfig(fsdp=2),
    "expert 2": MeshConfig(expert=2),
    "context 2": MeshConfig(context=2),
}
_KEY = (0, 0)


class Sizes(NamedTuple):
    """A model, and a batch."""

    model: ModelConfig
    batch: int
    length: int


# Layers, and experts of each. A large model is one that no H200 can train alone: `--needs` says by
# how much. Warm-up keeps masters only, a third of the state, so its model is the larger one.
_SIZES = {
    ("small", Stage.SPARSE): (3, 16),
    ("small", Stage.WARMUP): (3, 16),
    ("large", Stage.SPARSE): (6, 56),
    ("large", Stage.WARMUP): (24, 56),
}


def sizes(name: str, stage: Stage) -> Sizes:
    """Layers of DeepSeek-V3.2-Exp at 4096 wide, with fewer and narrower experts.

    Attention and indexer have its sizes but for `index_topk`.
    """
    if name == "exact":
        return Sizes(presets.get("tiny").replace(num_hidden_layers=2), 4, 256)
    if name == "tiny":
        return Sizes(
            presets.get("tiny").replace(num_hidden_layers=1, first_k_dense_replace=0), 2, 32
        )
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
    layers, experts = _SIZES[name, stage]
    return Sizes(layer.replace(num_hidden_layers=layers, n_routed_experts=experts), 2, 8192)


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


def train_config(case: Case, mesh: str) -> TrainConfig:
    """What a run of the stage would be configured as."""
    stage = Stage(case.stage)
    given = sizes(case.model, stage)
    return TrainConfig(
        stage=stage,
        model=given.model,
        mesh=MESHES[mesh],
        batch_size=given.batch,
        sequence_length=given.length,
        compute_dtype="float32" if case.model == "exact" else "bfloat16",
        steps=1000,
    ).resolved()


def make_batch(given: Sizes, mesh: Mesh) -> Batch:
    """Rows of three documents and some padding."""
    shape = (given.batch, given.length)
    tokens = np.random.default_rng(0).integers(2, given.model.vocab_size, shape, dtype=np.int32)
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


def lowered(
    config: TrainConfig, devices: Sequence[jax.Device] | None = None
) -> tuple[Plan, jax.stages.Lowered, jax.stages.Lowered]:
    """The plan of a run, its initialiser, and the step that training would compile.

    Args:
        config: of the run.
        devices: stand-ins for GPUs that are not here; None: this process's own.
    """
    mesh = make_mesh(config.mesh, devices)
    options: Any = {} if devices is None else {"lowering_platforms": ("cuda",)}
    with jax.set_mesh(mesh):
        run = plan(config, mesh)

        def init() -> TrainState:
            params = {
                path: _fill(path, number, shape)
                for number, (path, shape) in enumerate(run.skeleton.shapes.items())
            }
            return new_state(config, params, run.optimizer)

        where = jax.tree.map(lambda x: x.sharding, run.state)
        made = jax.jit(init, out_shardings=where).trace().lower(**options)
        return run, made, trace_step(run).lower(**options)


def ahead(case: Case, mesh: str) -> tuple[Plan, jax.stages.Lowered, jax.stages.Lowered]:
    """`lowered` for H200s that are not here."""
    from train.plan.hardware import GPUS
    from train.plan.worker import Job, devices

    switch(case)
    config = train_config(case, mesh)
    absent = devices(Job(config, GPUS["h200"].target, per_host=8))
    with dispatch.kernels(True):
        return lowered(config, absent)


def switch(case: Case) -> None:
    """Sets how rows travel to their experts."""
    expert_parallel.RAGGED, expert_parallel.ROOM = case.ragged, case.room


def needs(case: Case) -> dict[str, Any]:
    """What a step of the case needs, of each GPU, as the compiler says without one.

    More than the GPU has is an answer too: the program is compiled, not run.
    """
    from train.plan.hardware import GPUS

    run, _, step = ahead(case, case.mesh)
    row = memory_of(run, step.compile())
    total = row["state_gb"] + row["temporary_gb"]
    have = GPUS["h200"].memory / 1e9
    return row | {"needed_gb": total, "gpu_gb": have, "fits": total <= have}


def memory_of(run: Plan, step: jax.stages.Compiled) -> dict[str, Any]:
    """Parameters, and what one GPU holds of a step's state and temporaries."""
    memory: Any = step.memory_analysis()
    return {
        "parameters": sum(math.prod(x.shape) for x in run.skeleton.shapes.values()),
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
    }


def prepare(case: Case, folder: Path) -> None:
    """Compiles a case for two H200s on a machine that has none, and keeps its programs."""
    for mesh in case.meshes:
        _, *programs = ahead(case, mesh)
        kept = [serialize_executable.serialize(program.compile()) for program in programs]
        folder.mkdir(parents=True, exist_ok=True)
        _file(case, mesh, folder).write_bytes(lzma.compress(pickle.dumps(kept)))


def _file(case: Case, mesh: str, folder: Path) -> Path:
    name = "-".join((case.model, case.stage, mesh, *case.label.replace(",", "").split()))
    return folder / f"{name}.program".replace(" ", "-")


def program_of(case: Case, mesh: str) -> Program:
    """Compiles a case, or loads what was compiled for it."""
    config = train_config(case, mesh)
    file = _file(case, mesh, Path(case.programs))
    if case.programs and file.exists():
        say(f"loading {file.name}")
        try:
            return _loaded(config, file)
        except Exception as error:  # it was compiled for another version or GPU
            say(f"not loaded, so compiled: {type(error).__name__}: {str(error)[:500]}")
    run, *programs = lowered(config)
    return Program(run, *(program.compile() for program in programs))


def _loaded(config: TrainConfig, file: Path) -> Program:
    here = make_mesh(config.mesh)
    with jax.set_mesh(here):
        run = plan(config, here)
    load = functools.partial(
        serialize_executable.deserialize_and_load, execution_devices=list(here.devices.flat)
    )
    return Program(run, *(load(*kept) for kept in pickle.loads(lzma.decompress(file.read_bytes()))))


def introduce(mesh: Mesh) -> None:
    """Lets devices meet once: the first collective of a process takes seconds."""
    if mesh.size > 1:
        x = jax.device_put(jnp.ones(mesh.size), NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        jax.block_until_ready(jax.jit(jnp.sum)(x))


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


# In the names of NCCL's kernels, and of XLA's own that wait for another GPU.
_COLLECTIVES = ("nccl", "raggedalltoall", "ragged_all", "multigpubarrier", "multi_gpu_barrier")


def profile(stepping: _Stepping, devices: int) -> dict[str, Any]:
    """Milliseconds a GPU spends in a step's NCCL kernels, and in others; nothing without CUPTI."""
    if jax.default_backend() != "gpu":
        return {}
    from jax.experimental.mosaic.gpu import profiler

    _, kernels = profiler.measure(stepping, aggregate=False)()
    if not kernels:
        return {}
    times = {"communication_ms": 0.0, "compute_ms": 0.0}
    collectives: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, ms in kernels:  # pyright: ignore[reportGeneralTypeIssues]
        moves = any(word in name.lower() for word in _COLLECTIVES)
        times["communication_ms" if moves else "compute_ms"] += ms / devices
        short, kind = name.split("(")[0][:60], collectives if moves else others
        kind[short] = kind.get(short, 0.0) + ms / devices
    longest = sorted(others, key=lambda name: -others[name])[:8]
    return times | {
        "collectives_ms": collectives,
        "longest_ms": {name: others[name] for name in longest},
    }


def measure(program: Program, given: Sizes, steps: int) -> dict[str, Any]:
    """Losses, wall time, profile and memory of a program."""
    mesh = program.plan.mesh
    with jax.set_mesh(mesh):
        batch = make_batch(given, mesh)
        stepping = _Stepping(program.step, program.init(), batch)
        losses, seconds = [], []
        for _ in range(steps):
            began = time.perf_counter()
            metrics = jax.device_get(stepping())
            seconds.append(time.perf_counter() - began)
            losses.append(float(metrics["loss"]))
            say(f"step {len(losses)}: loss {losses[-1]:.6f}, {seconds[-1]:.3f} s")
        row: dict[str, Any] = {
            "losses": losses,
            "step_ms": 1e3 * min(seconds[1:]),
            "tokens_per_second": given.batch * given.length / min(seconds[1:]),
        }
        row |= profile(stepping, mesh.size)
    if "compute_ms" in row:
        row["communication_share"] = row["communication_ms"] / row["step_ms"]
        row["exposed_share"] = max(0.0, 1 - row["compute_ms"] / row["step_ms"])
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in mesh.devices.flat]
    row |= memory_of(program.plan, program.step)
    return row | {"peak_gb": max(peaks) / 1e9, "finite": bool(np.isfinite(losses).all())}


def resumed(two: Program, one: Program, given: Sizes) -> dict[str, Any]:
    """Saves on two devices, resumes on one, and lets both go on."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        config = two.plan.config
        with jax.set_mesh(two.plan.mesh):
            batch = make_batch(given, two.plan.mesh)
            state, _ = two.step(two.init(), batch)
            checkpoints = Checkpoints(Path(folder), config.model, 1)
            began = time.perf_counter()
            position = DataPosition(given.batch, given.length, {})
            checkpoints.save(1, state, RunRecord(to_dict(config), position, _KEY))
            checkpoints.wait()
            rows["save_seconds"] = time.perf_counter() - began
            say(f"saved in {rows['save_seconds']:.1f} s")
            saved = jax.device_get(state)
            _, metrics = two.step(state, batch)
            rows["loss_on_two"] = float(metrics["loss"])
        with jax.set_mesh(one.plan.mesh):
            began = time.perf_counter()
            state = start(one.plan, checkpoints).state
            rows["restore_seconds"] = time.perf_counter() - began
            say(f"restored in {rows['restore_seconds']:.1f} s")
            checkpoints.close()
            equal = jax.tree.map(np.array_equal, saved, jax.device_get(state))
            rows["bit_equal"] = all(jax.tree.leaves(equal))
            batch = make_batch(given, one.plan.mesh)
            rows["loss_on_one"] = float(one.step(state, batch)[1]["loss"])
    rows["relative_difference"] = abs(rows["loss_on_one"] / rows["loss_on_two"] - 1)
    return rows


def say(text: str) -> None:
    """A line for whoever watches."""
    print(f"    {text}", file=sys.stderr, flush=True)


def run(case: Case, ready: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The row of a case.

    Args:
        case: which.
        ready: called when all is compiled; when it returns, the GPUs are this case's.
    """
    given = sizes(case.model, Stage(case.stage))
    switch(case)
    programs = [program_of(case, mesh) for mesh in case.meshes]
    introduce(programs[0].plan.mesh)
    ready()
    if len(programs) == 2:
        return resumed(programs[0], programs[1], given)
    return measure(programs[0], given, case.steps)


def main(case: Case) -> None:
    """Talks to `benchmarks.two_gpus`."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # says where it hangs, if asked
    began = time.perf_counter()

    def answer(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    def ready() -> None:
        answer(ready=time.perf_counter() - began)
        if not sys.stdin.readline():
            raise SystemExit("nobody waits for this any more")

    try:
        answer(row=run(case, ready) | {"case": dataclasses.asdict(case)})
    except Exception as error:  # the other cases still tell something
        answer(row={"failed": f"{type(error).__name__}: {str(error)[:2000]}"})


if __name__ == "__main__":
    if sys.argv[2:3] == ["--prepare"]:
        prepare(Case(**json.loads(sys.argv[1])), Path(sys.argv[3]))
    elif sys.argv[2:3] == ["--needs"]:
        print(json.dumps(needs(Case(**json.loads(sys.argv[1])))), flush=True)
    else:
        main(Case(**json.loads(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # giving back what a program holds takes seconds
