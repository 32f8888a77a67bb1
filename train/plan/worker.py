"""Compiles one train step for devices that are not there; a process of its own.

    python -m train.plan.worker < job

The job is a pickled `Job`. Lines on stdout are JSON: `{"phase": ...}` as the work goes on, and at
the end `{"result": ...}`. A process of its own, because which platforms JAX loads and how many CPU
devices there are is decided once in a process's life.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from dsa_jax.sharding import make_mesh
from pallas_kernels import dispatch
from train.config import TrainConfig
from train.loop import trace_step
from train.plan import collectives, hlo
from train.plan.options import mesh_sizes
from train.start import plan

# Without a GPU there is nothing to tune Triton's products on, and its default tiles can take twenty
# times as long as cuBLAS, which chooses well by itself.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class Job(NamedTuple):
    """What to compile.

    Attributes:
        config: a resolved config, its mesh written out.
        target: the GPU as XLA describes one; None compiles for the CPU devices of this process.
        per_host: GPUs joined by NVLink.
        text: where to write the compiled program's text; None: nowhere.
        program: where to write the program itself, to run it where there is a GPU.
    """

    config: TrainConfig
    target: str | None
    per_host: int
    text: Path | None = None
    program: Path | None = None


def topology(target: str, count: int, per_host: int) -> list[Any]:
    """Stand-ins for so many GPUs, host by host.

    Args:
        target: the GPU as XLA describes one.
        count: of all.
        per_host: at most.
    """
    from jax._src import xla_bridge  # noqa: F401  finds the plugin
    from jax.experimental import topologies

    hosts = max(1, count // per_host)
    found = topologies.get_topology_desc(
        "", "cuda", target_config=target, topology=f"1x{hosts}x{count // hosts}"
    )
    return list(found.devices)


def devices(job: Job) -> list[Any]:
    """Stand-ins for the job's GPUs; or this process's CPU devices."""
    count = int(np.prod(job.config.mesh.sizes))
    if job.target is None:
        return list(jax.devices("cpu")[:count])
    return topology(job.target, count, job.per_host)


def lower(config: TrainConfig, mesh: Mesh, kernels: bool) -> jax.stages.Lowered:
    """The train step, traced and lowered for the mesh's devices."""
    platform = "cuda" if mesh.devices.flat[0].platform == "gpu" else "cpu"
    with dispatch.kernels(kernels):
        return trace_step(plan(config, mesh)).lower(lowering_platforms=(platform,))


def compile(job: Job) -> dict[str, Any]:
    """Compiles and reads the program; reports phases as it goes."""
    say(phase="tracing")
    mesh = make_mesh(job.config.mesh, devices(job))
    began = time.perf_counter()
    with jax.set_mesh(mesh), dispatch.recorded() as implementations:
        lowered = lower(job.config, mesh, kernels=job.target is not None)
        say(phase="compiling")
        compiled = lowered.compile(None if job.target is None else OPTIONS)
    say(phase="reading the program")
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise RuntimeError("the compiler tells neither its program nor its memory")
    if job.text is not None:
        job.text.write_text(text)
    if job.program is not None:
        job.program.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    program = hlo.parse(text)
    return {
        "seconds": time.perf_counter() - began,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        },
        "implementations": dict(implementations),
        "traffic": collectives.collectives(program, mesh_sizes(job.config.mesh), job.per_host),
        "work": hlo.work(program)._asdict(),
        "unknown_loops": program.unknown_loops,
    }


def say(**message: Any) -> None:
    """One line to the parent."""
    print(json.dumps(message), flush=True)


def main() -> None:
    """Reads a job from stdin, writes what came of it to stdout."""
    say(result=compile(pickle.load(sys.stdin.buffer)))


if __name__ == "__main__":
    main()
