"""Device time of a jitted function, cold L2, and the matmul rates to compare it with.

CUPTI times each GPU kernel; launch gaps and host time are not counted. Before each repetition a
buffer five times the size of the L2 is rewritten, so that every repetition starts cold.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

_FLUSH_BYTES = 256 * 2**20


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


def _flush(buffer: jax.Array) -> jax.Array:
    return buffer + 1


def device_time(fn: Callable[..., Any], *args: Any, repeats: int = 20) -> Timing:
    """Times `fn(*args)` on the GPU.

    Args:
        fn: a function of arrays; it is jitted here.
        *args: its inputs, already on the device.
        repeats: how many cold runs to take the median of.
    """
    buffer = jnp.zeros((_FLUSH_BYTES // 4,), jnp.int32)
    flush = jax.jit(_flush)
    flush_kernels = len(_one_run(flush, buffer))

    @jax.jit
    def cold(buffer, args):
        # The barrier makes the op's inputs depend on the flush, so the flush's kernels come first.
        flushed, args = jax.lax.optimization_barrier((_flush(buffer), args))
        return fn(*args), flushed

    runs = []
    for _ in range(repeats):
        runs.append(_one_run(cold, buffer, args)[flush_kernels:])
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


def _one_run(fn: Callable[..., Any], *args: Any) -> list[tuple[str, float]]:
    _, timings = profiler.measure(fn, aggregate=False)(*args)
    if timings is None:
        raise RuntimeError("CUPTI saw no kernel: device_time needs an NVIDIA GPU")
    return timings


@functools.cache
def matmul_rates(size: int = 8192) -> dict[str, float]:
    """TFLOP/s of a square bf16 and e4m3 matmul through XLA's library calls, on random data."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((size, size)), jnp.float32) for _ in range(2))
    rates = {}
    for name, dtype in (("bf16", jnp.bfloat16), ("e4m3", jnp.float8_e4m3fn)):
        x, y = a.astype(dtype), b.astype(dtype)

        def matmul(x, y):
            # Row-major times column-major: the layout both library calls take without a transpose.
            return jnp.einsum("mk,nk->mn", x, y, preferred_element_type=jnp.bfloat16)

        rates[name] = device_time(matmul, x, y).tflops(2 * size**3)
    return rates


def environment() -> dict[str, str]:
    """What a reader needs to place a figure: GPU, versions."""
    device = jax.devices()[0]
    return {
        "gpu": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "driver": getattr(device.client, "platform_version", "").replace("\n", " "),
    }
