"""What is about to run, printed before step 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from train.config import TrainConfig, to_dict
from train.stages import Group, group_of
from train.state import TrainState

_KIB = 1024


def counts(config: TrainConfig, state: TrainState) -> dict[str, int]:
    """Parameters by fate, and the bytes that the state takes on each device.

    `trainable` ones have a gradient, `balanced` ones are the routers' correction biases where they
    move, `indexer` counts those in the indexers whatever their fate.

    Args:
        config: a resolved config.
        state: arrays, or shapes with shardings.
    """
    size = dict.fromkeys(Group, 0)
    for path, leaf in state.params.items():
        size[group_of(path)] += int(np.prod(leaf.shape))
    trainable = sum(size[group] for group in config.trainable)
    balanced = size[Group.BALANCE] if config.bias_update_speed else 0
    return {
        "parameters": sum(size.values()),
        "trainable": trainable,
        "balanced": balanced,
        "frozen": sum(size.values()) - trainable - balanced,
        "indexer": size[Group.INDEXER],
        "parameter_bytes_per_device": _bytes(state.params),
        "optimizer_bytes_per_device": _bytes(state.opt_state),
    }


def show(
    console: Console,
    config: TrainConfig,
    state: TrainState,
    mesh: jax.sharding.Mesh,
    origin: str,
    notes: Sequence[str] = (),
) -> dict[str, int]:
    """Prints the resolved config, mesh, parameter counts and bytes per device.

    Args:
        console: where.
        config: a resolved config.
        state: the state before the first step.
        mesh: the devices.
        origin: where the parameters came from, in words.
        notes: more about it, one line each.

    Returns:
        `counts(config, state)`.
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for section, text in _sections(to_dict(config)):
        table.add_row(section, text)
    console.print(table, highlight=False)
    numbers = counts(config, state)
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    lines = {
        "devices": f"{mesh.size} {mesh.devices.flat[0].device_kind} ({axes or 'one'})",
        "start": "\n".join([origin, *notes]),
        "parameters": f"{numbers['parameters']:,}: {numbers['trainable']:,} trainable, "
        f"{numbers['balanced']:,} balanced, {numbers['frozen']:,} frozen; "
        f"{numbers['indexer']:,} are in the indexers",
        "bytes per device": f"{_size(numbers['parameter_bytes_per_device'])} parameters, "
        f"{_size(numbers['optimizer_bytes_per_device'])} optimizer",
        "tokens": f"{config.batch_size:,} x {config.sequence_length:,} a step, "
        f"{config.steps:,} steps",
    }
    table = Table(title=f"stage {config.stage.value}", show_header=False, title_justify="left")
    for name, value in lines.items():
        table.add_row(name, value)
    console.print(table)
    return numbers


def _sections(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One row a section of the config, the fields outside of any first."""
    own = {name: value for name, value in data.items() if not isinstance(value, Mapping)}
    nested = [(name, value) for name, value in data.items() if isinstance(value, Mapping)]
    return [
        (name, "  ".join(f"{k}={v}" for k, v in _fields(value)))
        for name, value in [("", own), *nested]
    ]


def _fields(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in data.items():
        if isinstance(value, Mapping):
            found += _fields(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _bytes(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < _KIB:
            return f"{count:.4g} {unit}"
        count /= _KIB
    return f"{count:,.2f} GiB"
