"""GPUs as the plan sees them: memory, peak rates, links, and the rates that kernels reach.

What a data sheet says is fixed; what is reached in practice is a default that a flag can change.
The defaults for kernels are this project's own on one H100, a few per cent below what they reach in
the measured steps of one layer or, where the length decides, at 128K (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from train.utilization import peak_flops


class Gpu(NamedTuple):
    """One kind of GPU.

    Attributes:
        name: as JAX prints it.
        memory: bytes that a CUDA context leaves to XLA's allocator.
        hbm_gbps: GB/s of memory, data sheet.
        per_host: GPUs joined by NVLink.
    """

    name: str
    memory: int
    hbm_gbps: float
    per_host: int = 8

    @property
    def peak_tflops(self) -> float:
        """Dense bf16, data sheet."""
        peak = peak_flops(self.name)
        assert peak is not None
        return peak / 1e12

    @property
    def target(self) -> str:
        """The GPU as XLA describes one to compile for it without seeing it."""
        return _TARGET.format(
            memory=self.memory, bandwidth=int(self.hbm_gbps * 1e9), name=self.name
        )


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_978_434_048, 3352.0),
    "h200": Gpu("NVIDIA H200", 150_100_000_000, 4800.0),
}

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


@dataclass(frozen=True)
class Rates:
    """What is reached of the hardware: TFLOP/s by what runs, GB/s by link. All are assumptions."""

    # Products with weights, bf16.
    matmul: float = 620.0
    # The experts' grouped products.
    experts: float = 680.0
    # Dense attention, forward.
    dense_attention: float = 650.0
    # Dense attention, gradient.
    dense_attention_gradient: float = 430.0
    # Sparse attention, forward: random keys at 128K.
    sparse_attention: float = 575.0
    # Sparse attention, gradient.
    sparse_attention_gradient: float = 280.0
    # The indexer's scores and their top-k in e4m3, a causal sequence at 128K.
    indexer: float = 1050.0
    # The same in bf16.
    indexer_bf16: float = 540.0
    # The warm-up loss, value and gradient.
    kl_dense: float = 445.0
    # The sparse stage's loss, value and gradient.
    kl_sparse: float = 360.0
    # Share of the data sheet's memory bandwidth that elementwise work reaches.
    hbm_share: float = 0.85
    # GB/s that a GPU sends over NVLink inside a host.
    nvlink: float = 350.0
    # GB/s that a GPU sends to other hosts: one 400 Gbit/s adapter a GPU.
    network: float = 45.0
    # Share of the communication that runs behind computation.
    overlap: float = 0.5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "overlap":
                if not 0 <= value <= 1:
                    raise ValueError(f"rates.overlap={value}: a share lies between 0 and 1")
            elif not value > 0:
                raise ValueError(f"rates.{field.name}={value}: must be above 0")
