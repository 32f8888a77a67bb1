"""How much of the devices a step uses: share of peak operations, peak memory, and a profile."""

from __future__ import annotations

import math
from pathlib import Path

import jax

from train import flops
from train.config import LogConfig, TrainConfig

# Dense bf16 TFLOP/s by data sheet; the first name that begins JAX's `device_kind` counts.
_PEAKS = (
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA H100 NVL", 835.0),
    ("NVIDIA H100", 989.4),
    ("NVIDIA H200 NVL", 835.0),
    ("NVIDIA H200", 989.4),
    ("NVIDIA GH200", 989.4),
    ("NVIDIA A100", 312.0),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak operations a second of one device in bf16; None for one that is not in the table."""
    found = (peak for name, peak in _PEAKS if device_kind.startswith(name))
    peak = next(found, None)
    return None if peak is None else peak * 1e12


class Utilization:
    """Turns seconds a step into shares of what the devices can do.

    Operations are those that the model needs (`train.flops.model_flop`): the indexer's scores on
    all keys a query sees, attention on those it selects, the experts that a token visits; nothing
    for what is computed again. A row counts as one document: of packed short ones, less is needed.

    Args:
        config: a resolved config.
        devices: of the mesh, all processes together.
    """

    def __init__(self, config: TrainConfig, devices: int):
        kind = jax.local_devices()[0].device_kind
        peak = peak_flops(kind) if config.compute_dtype == "bfloat16" else None
        assert config.batch_size is not None
        self._flops = config.batch_size * flops.model_flop(config) / devices
        self._peak = peak

    def of(self, seconds: float) -> dict[str, float]:
        """`tflops_per_device` reached in a step of `seconds`, and `mfu` where the peak is known."""
        reached = self._flops / seconds
        shares = {"tflops_per_device": reached / 1e12}
        return shares if self._peak is None else {**shares, "mfu": reached / self._peak}


def peak_memory() -> dict[str, int]:
    """`peak_memory_bytes`: the most that one of this process's devices has held since the start;
    empty where the backend does not count, as on CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return {"peak_memory_bytes": max(peaks)} if peaks else {}


class Profiler:
    """Traces some steps of process 0 into `profile` in the run's folder.

    Args:
        config: `profile_start`, `profile_steps`.
        folder: of the run.
    """

    def __init__(self, config: LogConfig, folder: Path):
        self._folder = folder / "profile"
        start = config.profile_start
        wanted = start is not None and jax.process_index() == 0
        self._first = start if wanted and start is not None else math.inf
        self._last = self._first + config.profile_steps - 1
        self._running = False

    def before(self, step: int) -> None:
        """To be called before a step is begun."""
        if not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, outputs: object) -> None:
        """To be called when a step is begun; waits for it if it is the last to be traced.

        Args:
            step: which.
            outputs: arrays that exist when it is done.
        """
        if self._running and step >= self._last:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being taken."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
