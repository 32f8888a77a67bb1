"""What is planned: one frozen dataclass, filled from the command line, checked before any work."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dsa_jax import presets
from dsa_jax.config import ModelConfig
from dsa_jax.sharding import AXES, MeshConfig, axes_tuple, batch_spec
from train.config import OptimizerConfig, TrainConfig
from train.plan.hardware import GPUS, Gpu, Rates
from train.stages import Stage


@dataclass(frozen=True)
class PlanOptions:
    """A training run that is thought about. A field that is None takes its stage's value."""

    # A name of `dsa_jax.presets`, a `config.json`, or a folder that holds one.
    preset: str = "deepseek-v3.2-exp"
    # `warmup` and `sparse` have the report's recipe, `dense` DeepSeek-V3's pre-training.
    stage: Stage = Stage.SPARSE
    # GPUs. 0: as many as the mesh has.
    devices: int = 0
    # What they are.
    gpu: Literal["h100", "h200"] = "h100"
    # Devices along each axis; one of them may be -1. All 1: the mesh that the search likes best.
    mesh: MeshConfig = field(default_factory=MeshConfig)
    # Tokens a sequence.
    sequence_length: int | None = None
    # Sequences a step, over all devices.
    batch_size: int | None = None
    # Parts of a batch that run one after the other. None: as many as leave one sequence to each
    # group of devices that works on one.
    micro_batches: int | None = None
    # Optimizer steps.
    steps: int | None = None
    # Type of Adam's first moment; the second is fp32.
    moment_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # What the backward pass recomputes.
    remat: str = "full"
    # Share of a GPU's memory that a run may fill; the rest is for NCCL, CUDA and fragmentation.
    memory_share: float = 0.92
    # Achieved rates.
    rates: Rates = field(default_factory=Rates)
    # Try every mesh of so many devices, and compile the best ones until one fits.
    search: bool = False
    # `cuda` compiles for the GPUs named, which needs JAX's CUDA plugin and no GPU; `cpu` compiles
    # for as many CPU devices, without the kernels; `none` only counts. `auto`: `cuda`; where the
    # plugin is missing `cpu` for up to 16 devices and `none` above.
    compile: Literal["auto", "cuda", "cpu", "none"] = "auto"
    # Write the compiled program here, as XLA prints it.
    text: Path | None = None
    # Print JSON on stdout instead of tables.
    json: bool = False

    @property
    def hardware(self) -> Gpu:
        """The GPU's data sheet."""
        return GPUS[self.gpu]

    @property
    def mesh_is_open(self) -> bool:
        """Whether no mesh was asked for."""
        return all(size == 1 for size in self.mesh.sizes) and self.devices > 1

    def resolved(self) -> PlanOptions:
        """The same with the number of devices and the mesh's sizes written out.

        Raises:
            ValueError: a mesh that is not of so many devices, a share out of range, no folder for
                the program's text.
        """
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share={self.memory_share}: a share lies above 0, at most 1")
        if self.devices < 0:
            raise ValueError(f"devices={self.devices}: must be at least 1, or 0 for the mesh's")
        if self.text is not None and not self.text.parent.is_dir():
            raise ValueError(f"text={self.text}: {self.text.parent} is no folder; make it first")
        known = math.prod(n for n in self.mesh.sizes if n != -1)
        devices, sizes = self.devices, list(self.mesh.sizes)
        if -1 in sizes:
            if devices == 0:
                raise ValueError("mesh has a -1, the rest of the devices: say how many, devices=N")
            if devices % known:
                raise ValueError(
                    f"devices={devices} is not a multiple of {known}, the mesh's other axes; "
                    "write the size of the axis that is -1 out"
                )
            sizes[sizes.index(-1)] = devices // known
        devices = devices or known
        if math.prod(sizes) != devices and any(n != 1 for n in sizes):
            written = " x ".join(f"{a}={n}" for a, n in zip(AXES, sizes, strict=True) if n != 1)
            raise ValueError(
                f"mesh {written} is {math.prod(sizes)} devices, but devices={devices}; "
                "make them agree, or leave one of the two out"
            )
        mesh = MeshConfig(*sizes)
        return dataclasses.replace(self, devices=devices, mesh=mesh)


def architecture(name: str) -> ModelConfig:
    """The config of a preset, a `config.json`, or a folder that holds one.

    Raises:
        ValueError: neither.
    """
    if name in presets.names():
        return presets.get(name)
    if Path(name).exists():
        return ModelConfig.from_hf(Path(name))
    raise ValueError(
        f"{name!r} is neither a file nor a preset; there are {', '.join(presets.names())}"
    )


def train_config(options: PlanOptions, model: ModelConfig, mesh: MeshConfig) -> TrainConfig:
    """The run that is planned, as `python -m train run` would be given it.

    Args:
        options: resolved.
        model: its architecture.
        mesh: written out.

    Raises:
        ValueError: fields that contradict each other, or more devices than the batch feeds.
    """
    if options.stage is Stage.DENSE and model.has_indexer:
        model = model.without_indexer()
    config = TrainConfig(
        stage=options.stage,
        model=model,
        mesh=mesh,
        steps=options.steps,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        optimizer=OptimizerConfig(moment_dtype=options.moment_dtype),
        remat=options.remat,
    ).resolved()
    assert config.batch_size is not None
    assert config.sequence_length is not None
    rows, parts = (ways(mesh, dimension) for dimension in (0, 1))
    if rows > config.batch_size:
        raise ValueError(
            f"{math.prod(mesh.sizes)} devices: {_over(mesh, 0)} would take {rows} sequences at a "
            f"time, but batch_size={config.batch_size}; cut sequences with mesh.context, raise the "
            "batch, or take fewer devices"
        )
    if config.batch_size % rows:
        raise ValueError(
            f"batch_size={config.batch_size} does not divide by {rows}, the sequences that "
            f"{_over(mesh, 0)} takes at a time; choose sizes whose product divides it"
        )
    if parts > 1 and config.sequence_length % (2 * parts):
        raise ValueError(
            f"sequence_length={config.sequence_length} does not divide into two chunks for each of "
            f"the {parts} devices of {_over(mesh, 1)}; choose a multiple of {2 * parts}"
        )
    micro = options.micro_batches
    micro = config.batch_size // rows if micro is None else micro
    return dataclasses.replace(config, micro_batches=micro).resolved()


def mesh_sizes(mesh: MeshConfig) -> dict[str, int]:
    """Axes and sizes, in order."""
    return {str(axis): size for axis, size in zip(AXES, mesh.sizes, strict=True)}


def ways(mesh: MeshConfig, dimension: int) -> int:
    """In how many parts a batch `[B, T]` is cut along one of its dimensions."""
    sizes = mesh_sizes(mesh)
    return math.prod(sizes[axis] for axis in _axes(dimension))


def _axes(dimension: int) -> tuple[str, ...]:
    return axes_tuple(batch_spec()[dimension])


def _over(mesh: MeshConfig, dimension: int) -> str:
    sizes = mesh_sizes(mesh)
    axes = [axis for axis in _axes(dimension) if sizes[axis] > 1] or list(_axes(dimension))[:1]
    return " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes)
