"""Device time of a jitted function, cold L2, and the matmul rates to compare it with.

CUPTI times each GPU kernel; launch gaps and host time are not counted. Between repetitions a buffer
five times the size of the L2 is rewritten, so that every repetition starts cold, and the GPU rests:
without that its power limit slows whatever runs for more than some ten milliseconds.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import fcntl
import functools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

Runs = list[list[tuple[str, float]]]  # the kernels of each run: name and milliseconds

_FLUSH_BYTES = 256 * 2**20
_REST_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of device time: the median, the extremes, and the share of each kernel."""

    median_ms: float
    min_ms: float
    max_ms: float
    kernels: dict[str, float]

    def tflops(self, flop: float) -> float:
        """TFLOP/s at the median."""
        return flop / self.median_ms / 1e9


class _Cold(jax.stages.Wrapped):
    """A call of `fn`, then one that rewrites the L2, by an operation that nothing timed here uses.

    Its kernel is told by its name: kernels of `fn` on a second stream may end after it.
    What `fn` returns is not kept; the memory goes back when the device is done with it.
    """

    def __init__(self, fn: Callable[..., Any]):
        ready = isinstance(fn, jax.stages.Wrapped | jax.stages.Compiled)
        self.fn: Any = fn if ready else jax.jit(fn)
        self.flush = jax.jit(jax.lax.population_count)
        self.buffer = jnp.zeros((_FLUSH_BYTES // 4,), jnp.int32)

    def __call__(self, *args):
        time.sleep(_REST_SECONDS)
        self.fn(*args)
        return jax.block_until_ready(self.flush(self.buffer))  # when all before it is

    def trace(self, *args, **kwargs):
        return self.fn.trace(*args, **kwargs)

    def lower(self, *args, **kwargs):
        return self.fn.lower(*args, **kwargs)


def device_time(fn: Callable[..., Any], *args: Any, repeats: int = 20) -> Timing:
    """Times `fn(*args)` on the GPU.

    Args:
        fn: a function of arrays; it is jitted here unless it is already, or compiled.
        *args: its inputs, already on the device.
        repeats: how many cold runs to take the median of; at least 2.
    """
    cold = _Cold(fn)
    [(flush, _)] = _kernels(cold.flush, cold.buffer)[0]
    runs = []
    for run in _kernels(cold, *args, repeats=repeats):
        runs.append([kernel for kernel in run if kernel[0] != flush])
        if len(runs[-1]) != len(run) - 1:
            raise RuntimeError(f"{fn} has kernels named {flush} as the flush of the L2 has")
    totals = [sum(ms for _, ms in run) for run in runs]
    shares: dict[str, list[float]] = {}
    for run in runs:
        summed: dict[str, float] = {}
        for name, ms in run:
            summed[name] = summed.get(name, 0.0) + ms
        for name, ms in summed.items():
            shares.setdefault(name, []).append(ms)
    kernels = {name: statistics.median(values) for name, values in shares.items()}
    return Timing(statistics.median(totals), min(totals), max(totals), kernels)


def _kernels(fn: Callable[..., Any], *args: Any, repeats: int = 2) -> Runs:
    """What CUPTI saw of each of so many calls, at least 2, after one to warm up."""
    try:
        _, timings = profiler.measure(fn, aggregate=False, iterations=repeats)(*args)
    except RuntimeError:  # two kernels ran side by side, and ended in another order once
        alone = profiler.measure(fn, aggregate=False, iterations=1)
        timings = [alone(*args)[1] for _ in range(repeats)]
    if timings is None or None in timings:
        raise RuntimeError("CUPTI saw no kernel: device_time needs an NVIDIA GPU")
    return cast(Runs, timings)


def compiled(calls: Sequence[tuple[Callable[..., Any], tuple]]) -> list[Callable[..., Any]]:
    """Functions compiled for their arguments, side by side: that takes longer than their runs."""

    def compile_one(call):
        fn, args = call
        return jax.jit(fn).lower(*args).compile()

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(compile_one, calls))


def reference_jit(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` jitted for a check: its matmuls are taken as they come, without a search for fast ones.

    On a GPU the search takes longer than all else that a check does.
    """
    options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
    return jax.jit(fn, compiler_options=options)


@jax.jit
def _equal(found, again):
    return jnp.stack(
        [jnp.array_equal(*xs) for xs in zip(*map(jax.tree.leaves, (found, again)), strict=True)]
    ).all()


def equal_runs(run: Callable[[], Any], found: Any, runs: int = 20) -> int:
    """How many of so many runs give the bits of `found`."""
    return sum(bool(_equal(found, run())) for _ in range(runs))


_held: list[Any] = []


def wait_for(lock: Path | None) -> None:
    """Waits for a file's lock and keeps it until this process ends, and its memory is free.

    So processes that share a GPU can be made ready side by side and use it one after the other.
    """
    if lock is not None and not _held:
        _held.append(lock.open("a"))
        fcntl.flock(_held[0], fcntl.LOCK_EX)


@functools.cache
def matmul_rates(size: int = 8192) -> dict[str, float]:
    """TFLOP/s of a square bf16 and e4m3 matmul through XLA's library calls, on random data."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size)) for key in keys)

    # Without Triton's candidates, which never win at this size and take half a minute to compile.
    @functools.partial(jax.jit, compiler_options={"xla_gpu_enable_triton_gemm": False})
    def matmul(x, y):
        # Row-major times column-major: the layout both library calls take without a transpose.
        return jnp.einsum("mk,nk->mn", x, y, preferred_element_type=jnp.bfloat16)

    rates = {}
    for name, dtype in (("bf16", jnp.bfloat16), ("e4m3", jnp.float8_e4m3fn)):
        rates[name] = device_time(matmul, a.astype(dtype), b.astype(dtype)).tflops(2 * size**3)
    return rates


def environment() -> dict[str, str]:
    """What a reader needs to place a figure: day, GPU, versions."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "driver": getattr(device.client, "platform_version", "").replace("\n", " "),
    }
