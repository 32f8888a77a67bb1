"""Models on disk: `save` and `load`.

A folder has `config.json` and one leaf per parameter and layer (`dsa_jax.store`). In memory the
layers of one kind are stacked so that they can be scanned; `dsa_jax.layer_tree` leads from one
shape to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from dsa_jax.config import ModelConfig
from dsa_jax.layer_tree import (
    KeyPath,
    LeafPlace,
    by_memory,
    flatten,
    leaf_places,
    name_difference,
    nest,
    scale_path,
    unflatten,
)
from dsa_jax.mtp import MTP
from dsa_jax.quantization import E4M3, weight_dequant
from dsa_jax.sharding import Rules, param_specs, shardings
from dsa_jax.store import CheckpointError, CheckpointReader, CheckpointWriter, load_config
from dsa_jax.transformer import Transformer

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "CheckpointWriter",
    "abstract_model",
    "load",
    "load_config",
    "load_mtp",
    "save",
]

# Leaves are copied out of their stacks and written, or read and stacked, in groups of about this
# many bytes: the memory needed beyond the model.
_GROUP_BYTES = 2**30


def save(
    model: Any, path: str | Path, *, config: ModelConfig | None = None, mtp: Sequence[MTP] = ()
) -> None:
    """Writes a model's parameters and config to a new folder.

    Needs about 1 GiB beyond the model: layers are copied out of their stacks in groups.

    Args:
        model: a `Transformer`, or a tree of its parameters (then give `config`).
        path: the folder to make; refused if anything is there.
        config: the model's. None: `model.config`.
        mtp: multi-token-prediction layers to go with it, from `load_mtp`.

    Raises:
        FileExistsError: `path` exists.
        CheckpointError: writing failed; nothing is at `path`.
    """
    if config is None:
        config = model.config
        assert isinstance(config, ModelConfig)
    flat = flatten(model)

    def nbytes(place: LeafPlace) -> int:
        whole = _nbytes(flat[place.memory])
        return whole if place.row is None else whole // flat[place.memory].shape[0]

    with CheckpointWriter(path, config) as writer:
        for group in _groups(leaf_places(flat, config), nbytes):
            writer.write(nest(_rows(flat, group)))
        for number, layer in enumerate(mtp):
            writer.write({"mtp": {str(number): nest(flatten(layer))}})


def _rows(flat: Mapping[KeyPath, Any], group: list[LeafPlace]) -> dict[KeyPath, Any]:
    """The leaves on disk of a group, as copies out of their stacks."""
    found = {p.disk: flat[p.memory] for p in group if p.row is None}
    layers = [p for p in group if p.row is not None]
    stacks = {p.memory: flat[p.memory] for p in layers}
    # One program for the group: one for each leaf would compile for longer than it writes.
    take = jax.jit(
        lambda stacks: [stacks[p.memory][p.row] for p in layers],
        out_shardings=[_one_layer(getattr(stacks[p.memory], "sharding", None)) for p in layers],
    )
    found |= {p.disk: leaf for p, leaf in zip(layers, take(stacks), strict=True)}
    return found


def _one_layer(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    """The sharding of one layer's leaf, from that of its stack."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _nbytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _groups[Item](items: Iterable[Item], nbytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Runs of items of about `_GROUP_BYTES` together."""
    group: list[Item] = []
    total = 0
    for item in items:
        if group and total + nbytes(item) > _GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(item)
        total += nbytes(item)
    if group:
        yield group


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    *,
    rules: Rules | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike | None = None,
) -> Transformer:
    """Reads a model, onto any mesh, whatever mesh wrote it.

    Each process reads the slices of its devices. Beyond the model, memory is needed for the largest
    stack of leaves, or 1 GiB.

    Args:
        path: a folder written by `save`.
        mesh: from `dsa_jax.sharding.make_mesh`. None: everything on the default device.
        rules: how parameters spread over the mesh; None is `Rules()`.
        dtype: the compute dtype.
        param_dtype: the parameters'; None: as stored. Weights stored in FP8 are multiplied by their
            block scales on the way if it is another type.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: no checkpoint, parameters that do not fit its config (missing, left over,
            of another shape), or damaged files; names the path and the leaf.
    """
    reader = CheckpointReader(path)

    def make(param_dtype: DTypeLike) -> Transformer:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        return Transformer(reader.config, rngs=nnx.Rngs(0), rules=rules, **options)

    stored = {name: leaf for name, leaf in reader.leaves.items() if name[0] != "mtp"}
    return _load(reader, stored, make, mesh, rules, param_dtype, ())


def load_mtp(
    path: str | Path,
    mesh: Mesh | None = None,
    *,
    number: int = 0,
    rules: Rules | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike | None = None,
) -> MTP:
    """Reads a multi-token-prediction layer, which `load` leaves out.

    Args:
        path: as for `load`, as are the others.
        mesh: where to.
        number: which, of `config.num_nextn_predict_layers`.
        rules: how parameters spread over the mesh.
        dtype: the compute dtype.
        param_dtype: the parameters'; None: as stored.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: as for `load`, and where there is no such layer.
    """
    reader = CheckpointReader(path)
    prefix = ("mtp", str(number))
    stored = {name: leaf for name, leaf in reader.leaves.items() if name[:2] == prefix}
    if not stored:
        raise CheckpointError(f"{path} holds no multi-token-prediction layer {number}")

    def make(param_dtype: DTypeLike) -> MTP:
        return MTP(reader.config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)

    return _load(reader, stored, make, mesh, rules, param_dtype, prefix)


def _load[Model](
    reader: CheckpointReader,
    stored: Mapping[KeyPath, jax.ShapeDtypeStruct],
    make: Callable[[DTypeLike], Model],
    mesh: Mesh | None,
    rules: Rules | None,
    param_dtype: DTypeLike | None,
    prefix: KeyPath,
) -> Model:
    kept = _param_dtype(reader.path, stored)
    asked = kept if param_dtype is None else jnp.dtype(param_dtype)
    if asked == E4M3 != kept:
        raise CheckpointError(
            f"{reader.path} stores {kept} weights, which a cast cannot turn into {asked}: weights "
            "in FP8 have scales. Leave param_dtype out, or convert the checkpoint first"
        )
    like = _abstract(lambda: make(asked), mesh, rules)
    wanted = flatten(like)
    if kept == E4M3 != asked:
        in_fp8 = flatten(_abstract(lambda: make(E4M3), mesh, rules))
        wanted |= {m: x for m, x in in_fp8.items() if x.dtype == E4M3 or m not in wanted}
    places = [p._replace(disk=(*prefix, *p.disk)) for p in leaf_places(wanted, reader.config)]
    _compare(reader.path, places, wanted, stored)
    leaves: dict[KeyPath, jax.Array] = {}
    for group in _groups(by_memory(places).items(), lambda item: _nbytes(wanted[item[0]])):
        read = reader.read({p.disk: _target(wanted[m], p) for m, rows in group for p in rows})
        leaves |= {m: read.pop(rows[0].disk) for m, rows in group if rows[0].row is None}
        parts = {m: [read[p.disk] for p in rows] for m, rows in group if m not in leaves}
        leaves |= _stack(parts, {m: wanted[m] for m in parts})
    if kept == E4M3 != asked:
        _dequantize(leaves, flatten(like), reader.config)
    return unflatten(leaves, like)


def _dequantize(
    leaves: dict[KeyPath, jax.Array],
    wanted: Mapping[KeyPath, jax.ShapeDtypeStruct],
    config: ModelConfig,
) -> None:
    """Replaces FP8 weights and their scales by their product, one at a time."""
    assert config.fp8_weights is not None
    tile = config.fp8_weights.tile
    for name in [name for name, leaf in leaves.items() if leaf.dtype == E4M3]:
        q, scale = leaves.pop(name), leaves.pop(scale_path(name))
        like = wanted[name]
        product = jax.jit(
            lambda q, scale, dtype=like.dtype: weight_dequant(q, scale, tile, dtype),
            out_shardings=like.sharding,
        )
        leaves[name] = product(q, scale)


def abstract_model(
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    rules: Rules | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike = jnp.float32,
) -> Transformer:
    """A model of shapes: `jax.ShapeDtypeStruct` leaves that carry the sharding they shall get."""
    return _abstract(
        lambda: Transformer(
            config,
            rngs=nnx.Rngs(0),
            dtype=dtype,
            param_dtype=param_dtype,
            rules=rules,
        ),
        mesh,
        rules,
    )


def _abstract[Model](make: Callable[[], Model], mesh: Mesh | None, rules: Rules | None) -> Model:
    like = jax.eval_shape(make)
    if mesh is None:
        place = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), like)
    else:
        place = shardings(param_specs(like, mesh, rules), mesh)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        like,
        place,
    )


def _target(stacked: jax.ShapeDtypeStruct, place: LeafPlace) -> jax.ShapeDtypeStruct:
    """What is to be read of a leaf on disk for a leaf in memory."""
    if place.row is None:
        return stacked
    where = _one_layer(stacked.sharding)
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype, sharding=where)


def _stack(
    parts: dict[KeyPath, list[jax.Array]], targets: dict[KeyPath, jax.ShapeDtypeStruct]
) -> dict[KeyPath, jax.Array]:
    where = {memory: target.sharding for memory, target in targets.items()}
    stack = jax.jit(lambda parts: {m: jnp.stack(p) for m, p in parts.items()}, out_shardings=where)
    return stack(parts)


def _param_dtype(path: Path, stored: Mapping[KeyPath, Any]) -> jnp.dtype:
    """The dtype of most of the stored numbers."""
    sizes: dict[jnp.dtype, int] = {}
    for leaf in stored.values():
        dtype = jnp.dtype(leaf.dtype)
        sizes[dtype] = sizes.get(dtype, 0) + int(np.prod(leaf.shape))
    if not sizes:
        raise CheckpointError(f"{path} is damaged: it holds no parameters")
    return max(sizes, key=lambda dtype: sizes[dtype])


def _compare(
    path: Path,
    places: list[LeafPlace],
    wanted: Mapping[KeyPath, Any],
    stored: Mapping[KeyPath, Any],
) -> None:
    if problem := name_difference({p.disk for p in places}, set(stored)):
        raise CheckpointError(f"{path} {problem}")
    for place in places:
        shape = wanted[place.memory].shape
        shape = tuple(shape if place.row is None else shape[1:])
        found = tuple(stored[place.disk].shape)
        if found != shape:
            raise CheckpointError(
                f"{path}: {'/'.join(place.disk)} has shape {found}, but its config.json asks for "
                f"{shape}; the parameters are of another config"
            )
