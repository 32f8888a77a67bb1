"""Which mesh suits a run: all that divide, compared by arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from dsa_jax.config import ModelConfig
from dsa_jax.sharding import MeshConfig
from train.config import TrainConfig
from train.plan import counted
from train.plan.estimate import Estimate, estimate, other_bytes
from train.plan.options import PlanOptions, train_config

# Heads are cut inside a host only: their sums are on the way of every layer.
_TENSOR = (1, 2, 4, 8)
# What arithmetic puts above this share of the limit is not worth compiling.
_NEAR = 1.15
_MOST_DEVICES = 1 << 14


class Candidate(NamedTuple):
    """A mesh and what arithmetic says of it.

    Attributes:
        config: the run on this mesh.
        state: of each device.
        temporaries: bytes of a device beside its state, by what they are.
        estimate: of a step.
        fits: whether it all goes into the memory that may be filled.
    """

    config: TrainConfig
    state: counted.State
    temporaries: dict[str, int]
    estimate: Estimate
    fits: bool

    @property
    def bytes(self) -> int:
        """All that a device must hold."""
        held = self.state.parameter_bytes + self.state.optimizer_bytes
        return held + sum(self.temporaries.values())

    @property
    def held(self) -> int:
        """Parameters, optimizer and gradients once: what no way to compute does without."""
        return self.state.parameter_bytes + self.state.optimizer_bytes + self.state.gradient_bytes


def meshes(devices: int) -> Iterator[MeshConfig]:
    """Every way to write a number of devices as a product of the five axes."""
    for tensor in (n for n in _TENSOR if devices % n == 0):
        for context in _divisors(devices // tensor):
            rest = devices // tensor // context
            for expert in _divisors(rest):
                for fsdp in _divisors(rest // expert):
                    yield MeshConfig(rest // expert // fsdp, fsdp, expert, context, tensor)


def count(options: PlanOptions, config: TrainConfig, shapes: counted.Shapes) -> Candidate:
    """What arithmetic says of a run on its mesh.

    Raises:
        ValueError: the mesh does not divide a parameter.
    """
    held = counted.state(config, shapes)
    temporaries = counted.temporaries(config, held)
    state_bytes = held.parameter_bytes + held.optimizer_bytes
    moved = other_bytes(config, state_bytes, held.gradient_bytes, counted.tokens_at_once(config))
    gpu = options.hardware
    found = Candidate(
        config,
        held,
        temporaries,
        estimate(config, gpu, options.rates, counted.traffic(config, gpu.per_host), moved),
        fits=False,
    )
    return found._replace(fits=found.bytes <= gpu.memory * options.memory_share)


def rank(options: PlanOptions, model: ModelConfig) -> list[Candidate]:
    """Every mesh of the planned number of devices that the run divides over, the best first.

    Those that fit come first, the fastest of them in front; then the others, the smallest in front.

    Args:
        options: resolved.
        model: the architecture.

    Raises:
        ValueError: no mesh divides; the message says why the first one tried does not.
    """
    shapes, found, problem = None, [], ""
    for mesh in meshes(options.devices):
        try:
            config = train_config(options, model, mesh)
            shapes = shapes or counted.shapes_of(config)
            found.append(count(options, config, shapes))
        except ValueError as error:
            problem = problem or str(error)
    if not found:
        raise ValueError(
            f"no mesh of {options.devices} devices divides this run; of the first one tried: "
            f"{problem}"
        )
    return sorted(found, key=_order)


def to_compile(candidates: list[Candidate], limit: int, number: int) -> list[Candidate]:
    """Which meshes to compile, one after the other, until one fits.

    The fastest of those that arithmetic puts near the limit or below it; as the last, the one of
    them that takes the least memory.

    Args:
        candidates: as `rank` returns them.
        limit: bytes that may be filled.
        number: of tries.
    """
    near = [one for one in candidates if one.bytes <= _NEAR * limit]
    if len(near) <= number:
        return near
    first = near[: number - 1]
    return [*first, min(near[number - 1 :], key=lambda one: one.bytes)]


def enough(options: PlanOptions, model: ModelConfig, candidates: list[Candidate]) -> int | None:
    """How many devices would do, by arithmetic: those planned, doubled until a mesh fits.

    Args:
        options: of a plan that does not fit.
        model: the architecture.
        candidates: its meshes.

    Returns:
        The number; None if the run cannot be cut over enough devices.
    """
    limit = options.hardware.memory * options.memory_share
    least = options.devices * min(one.held for one in candidates)
    devices = 2 * options.devices
    while devices <= _MOST_DEVICES:
        if least <= devices * limit:  # else not even the state goes into so many
            try:
                if rank(dataclasses.replace(options, devices=devices), model)[0].fits:
                    return devices
            except ValueError:
                return None
        devices *= 2
    return None


def _order(one: Candidate) -> tuple:
    # Of meshes that are as good as each other, the one with fewer axes.
    used = sum(n > 1 for n in dataclasses.astuple(one.config.mesh))
    return (not one.fits, round(one.estimate.step, 2) if one.fits else one.bytes, used)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
