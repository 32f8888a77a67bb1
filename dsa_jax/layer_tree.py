"""Parameters in two shapes: stacked for a scan in memory, one leaf per layer on disk.

In memory the layers of one kind are stacked along a leading axis (`dsa_jax.plan.layer_plan`). On
disk every layer has leaves of its own, `layers/<i>/...`: how layers are grouped is then no part of
a checkpoint's format, and one layer can be written or read without the others. Both shapes belong
to any tree with a model's paths: parameters, gradients, Adam's moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsa_jax.config import ModelConfig
from dsa_jax.plan import layer_plan
from dsa_jax.sharding import path_name

type KeyPath = tuple[str, ...]
"""The path of a leaf: that of `a.b[0]` is `("a", "b", "0")`."""


class LeafPlace(NamedTuple):
    """Where a leaf on disk is found in memory: `params[memory]`, or `[row]` of it."""

    disk: KeyPath
    memory: KeyPath
    row: int | None


def leaf_places(memory_paths: Iterable[KeyPath], config: ModelConfig) -> list[LeafPlace]:
    """The leaves on disk of the leaves in memory, ordered by layer.

    `stacks/<s>/blocks/<u>/<rest>` becomes `layers/<i>/<rest>` for each layer i of that block; what
    stands before it and other paths stay as they are.
    """
    plans = layer_plan(config)
    outside: list[LeafPlace] = []
    inside: list[tuple[int, LeafPlace]] = []
    for path in memory_paths:
        if "stacks" not in path:
            outside.append(LeafPlace(path, path, None))
            continue
        at = path.index("stacks")
        plan = plans[int(path[at + 1])]
        for row in range(plan.repeats):
            layer = plan.layer(int(path[at + 3]), row)
            disk = (*path[:at], "layers", str(layer), *path[at + 4 :])
            inside.append((layer, LeafPlace(disk, path, row)))
    inside.sort(key=lambda found: found[0])
    return outside + [place for _, place in inside]


def split_layers(params: Any, config: ModelConfig) -> dict[str, Any]:
    """Stacked parameters -> the tree on disk, one leaf per layer.

    Args:
        params: a model, its state, or any tree of the same paths (Adam's moments, gradients).
        config: the model's: it decides which layer is which row of which stack.

    Returns:
        Nested dictionaries `{"layers": {"0": ...}, ...}` of slices; the inverse of `stack_layers`.
    """
    flat = flatten(params)
    places = leaf_places(flat, config)
    return nest(
        {p.disk: flat[p.memory] if p.row is None else flat[p.memory][p.row] for p in places}
    )


def stack_layers(tree: Mapping[str, Any], like: Any, config: ModelConfig) -> Any:
    """The tree on disk -> stacked parameters.

    Args:
        tree: from `split_layers`.
        like: a tree of the wanted structure: a model's state or its shapes.
        config: the model's.

    Raises:
        ValueError: leaves that are missing or left over.
    """
    on_disk = flatten(tree)
    wanted = leaf_places(flatten(like), config)
    if problem := name_difference({p.disk for p in wanted}, set(on_disk)):
        raise ValueError(f"stack_layers: the tree {problem}")
    stacked: dict[KeyPath, Any] = {}
    for memory, rows in by_memory(wanted).items():
        leaves = [on_disk[p.disk] for p in rows]
        stacked[memory] = leaves[0] if rows[0].row is None else jnp.stack(leaves)
    return unflatten(stacked, like)


def flatten(tree: Any) -> dict[KeyPath, Any]:
    """A tree's leaves by path; the path of `a.b[0]` is `("a", "b", "0")`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_strings(path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[KeyPath, Any], like: Any) -> Any:
    """A tree of the structure of `like` with these leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_strings(path)], like)


def nest(leaves: Mapping[KeyPath, Any]) -> dict[str, Any]:
    """Nested dictionaries from leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def scale_path(path: KeyPath) -> KeyPath:
    """The path of the block scales of a weight in FP8."""
    *parents, last = path
    return (*parents, "scale" if last == "weight" else f"{last}_scale")


def _strings(path: Any) -> KeyPath:
    return tuple(path_name(path).split("/"))


def by_memory(places: list[LeafPlace]) -> dict[KeyPath, list[LeafPlace]]:
    """The places of each leaf in memory, in the order of its rows."""
    found: dict[KeyPath, list[LeafPlace]] = {}
    for place in places:
        found.setdefault(place.memory, []).append(place)
    return {m: sorted(rows, key=lambda p: p.row or 0) for m, rows in found.items()}


def name_difference(wanted: set[KeyPath], found: set[KeyPath]) -> str | None:
    """What is missing or left over, as the end of a sentence; None if nothing is."""
    for names, problem in (
        (wanted - found, "lacks {} that its config asks for"),
        (found - wanted, "holds {} that its config does not know"),
    ):
        if names:
            some = ", ".join("/".join(name) for name in sorted(names)[:3])
            count = f"{len(names)} parameters" if len(names) > 1 else "a parameter"
            more = ", ..." if len(names) > 3 else ""
            return f"{problem.format(count)}: {some}{more}"
    return None
