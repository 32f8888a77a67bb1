"""What the compiler says of a step, asked of a process that compiles it for the devices planned."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from train.config import TrainConfig
from train.plan import hlo
from train.plan.collectives import Traffic
from train.plan.hardware import Gpu
from train.plan.worker import Job

Backend = Literal["cuda", "cpu"]


class CompileError(RuntimeError):
    """The step does not compile; the message ends with what the compiler said."""


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
        backend: what it was compiled for.
        seconds: that tracing, lowering and compiling took.
        memory: bytes of a device, by what they are: arguments (state and batch), temporaries,
            outputs that reuse no argument.
        implementations: of each op, as `pallas_kernels.dispatch.recorded` tells them.
        traffic: collectives.
        work: products and memory traffic of one device.
        unknown_loops: loops whose passes the program does not say, counted as one.
    """

    backend: Backend
    seconds: float
    memory: dict[str, int]
    implementations: dict[str, str]
    traffic: list[Traffic]
    work: hlo.Work
    unknown_loops: int

    @property
    def bytes(self) -> int:
        """All that a device must hold at once."""
        return sum(self.memory.values())


def plugin_found() -> bool:
    """Whether this environment can compile for GPUs."""
    return any(
        importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (12, 13)
    )


def compile_step(
    config: TrainConfig,
    gpu: Gpu,
    backend: Backend,
    on_phase: Callable[[str], None] = lambda phase: None,
    text: Path | None = None,
    program: Path | None = None,
) -> Compiled:
    """Compiles the step of a run in a process of its own.

    Args:
        config: resolved, its mesh written out.
        gpu: what to compile for.
        backend: `cuda` for the GPU; `cpu` for as many CPU devices.
        on_phase: called with the name of each phase as it begins.
        text: where to write the compiled program's text; None: nowhere.
        program: where to write the program itself, as `jax.experimental.serialize_executable` does.

    Raises:
        CompileError: the process failed.
    """
    job = Job(config, gpu.target if backend == "cuda" else None, gpu.per_host, text, program)
    devices = math.prod(config.mesh.sizes)
    flags = [os.environ.get("XLA_FLAGS", "")]
    if backend == "cpu":
        flags.append(f"--xla_force_host_platform_device_count={devices}")
    root = str(Path(__file__).resolve().parents[2])
    env = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
        XLA_FLAGS=" ".join(flags),
        PYTHONPATH=os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    )
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as stdin:
        pickle.dump(job, stdin)
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "train.plan.worker"],
            env=env, stdin=stdin, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        try:
            result = _follow(process, on_phase)
        finally:
            process.kill()
            process.wait()
        if result is None:
            errors.seek(0)
            raise CompileError(_reason(config, backend, process.returncode, errors.read()))
    return Compiled(
        backend,
        result["seconds"],
        result["memory"],
        result["implementations"],
        [Traffic._make((op, tuple(axes), *rest)) for op, axes, *rest in result["traffic"]],
        hlo.Work(**result["work"]),
        result["unknown_loops"],
    )


def _follow(process: subprocess.Popen[str], on_phase: Callable[[str], None]) -> dict | None:
    """Passes on the phases; returns the result, or None from a process that died without one."""
    result = None
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("{"):
            continue  # a library's print
        message = json.loads(line)
        result = message.get("result", result)
        if "phase" in message:
            on_phase(message["phase"])
    process.wait()
    return result


def _reason(config: TrainConfig, backend: Backend, code: int, errors: bytes) -> str:
    lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
    what = f"compiling for {math.prod(config.mesh.sizes)} devices ({backend}) failed"
    if code == -9:
        what += ": the process was killed, most likely for this machine's memory"
    said = [line for line in lines if not line.startswith(("W", "I", "E0", "E1", "  "))]
    return f"{what}\n" + "\n".join(said[-3:])
