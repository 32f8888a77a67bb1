"""Models on disk: one folder with `config.json` and one leaf per parameter and layer.

    path/config.json            the architecture, as in Hugging Face's, numerics included
    path/params/                an Orbax checkpoint: embedding..., layers/0/..., layers/1/...

In memory the layers of one kind are stacked so that they can be scanned; `dsa_jax.layer_tree`
leads from one shape to the other.

A folder is written under another name and renamed when it is whole, so what loads is complete: a
crash, a full disk or a kill leave nothing at the path itself. Everything that needs Orbax's
experimental interface is in this file.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx
from jax.experimental import multihost_utils
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
    unflatten,
)
from dsa_jax.quantization import E4M3
from dsa_jax.sharding import Rules, param_specs, shardings
from dsa_jax.transformer import Transformer

# Larger leaves are stored in chunks of at most this many bytes, so that a device that needs a slice
# of a leaf does not read all of it.
_CHUNK_BYTES = 64 * 2**20
# Leaves are copied out of their stacks and written, or read and stacked, in groups of about this
# many bytes: the memory needed beyond the model.
_GROUP_BYTES = 2**30


class CheckpointError(ValueError):
    """A folder that is not a whole checkpoint of this package; the message says what is wrong."""


# --- writing --------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes a checkpoint piece by piece; it appears at `path` only when the block ends well.

    Every process of a run opens one and writes the same pieces, each storing the part its devices
    hold. A piece is some leaves of the tree on disk, each written once:

        with CheckpointWriter(path, config) as writer:
            for i in range(config.num_hidden_layers):
                writer.write({"layers": {str(i): ...}})

    Args:
        path: the folder to make; refused if anything is there.
        config: the model's, stored as `config.json`.

    Raises:
        FileExistsError: `path` exists.
        CheckpointError: writing failed (a full disk, say); nothing is at `path`, and what was
            there before anywhere is untouched.
    """

    def __init__(self, path: str | Path, config: ModelConfig):
        self.path = _local(path)
        self._config = config

    def __enter__(self) -> Self:
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists; choose another path or remove it first")
        token = secrets.randbits(32)
        if jax.process_count() > 1:
            token = int(multihost_utils.broadcast_one_to_all(np.uint32(token)))
        self._folder = self.path.with_name(f"{self.path.name}.writing-{token:08x}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"could not save to {self.path}: {error}") from error
        return self

    def write(self, tree: Mapping[str, Any]) -> None:
        """Writes some leaves: nested dictionaries of `jax.Array` or `numpy.ndarray`."""
        try:
            with _orbax():
                ocp.partial.save(str(self._folder / "params"), dict(tree))
        except Exception as error:
            raise self._failed(error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
                return
        except Exception as failure:
            _remove(self._folder)
            raise self._failed(failure) from failure
        _remove(self._folder)

    def _finish(self) -> None:
        with _orbax():
            ocp.partial.finalize(str(self._folder / "params"))
        if jax.process_index() == 0:
            with open(self._folder / "config.json", "w", encoding="utf-8") as file:
                json.dump(self._config.to_hf(), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.rename(self._folder, self.path)
            _sync_folder(self.path.parent)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"dsa_jax.checkpoint {self._folder.name}")

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"could not save to {self.path}, nothing is there: {_line(error)}")


def save(model: Any, path: str | Path, *, config: ModelConfig | None = None) -> None:
    """Writes a model's parameters and config to a new folder.

    Needs about 1 GiB beyond the model: layers are copied out of their stacks in groups.

    Args:
        model: a `Transformer`, or a tree of its parameters (then give `config`).
        path: the folder to make; refused if anything is there.
        config: the model's. None: `model.config`.

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


# --- reading --------------------------------------------------------------------------------------


def load_config(path: str | Path) -> ModelConfig:
    """The config of a checkpoint.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: no checkpoint, or an unreadable config.
    """
    path = _local(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: it does not exist")
    if not (path / "config.json").is_file() or not (path / "params").is_dir():
        raise CheckpointError(
            f"{path} is not a checkpoint of dsa_jax: it needs config.json and a folder params"
        )
    try:
        return ModelConfig.from_hf(path)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


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
        param_dtype: the parameters'; None: as stored.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: no checkpoint, parameters that do not fit its config (missing, left over,
            of another shape), or damaged files; names the path and the leaf.
    """
    path = _local(path)
    config = load_config(path)
    stored = _stored_leaves(path)
    kept = _param_dtype(path, stored)
    param_dtype = kept if param_dtype is None else jnp.dtype(param_dtype)
    if kept != param_dtype and E4M3 in (kept, param_dtype):
        raise CheckpointError(
            f"{path} stores {kept} weights, which a cast cannot turn into {param_dtype}: weights "
            "in FP8 have scales. Leave param_dtype out, or convert the checkpoint first"
        )
    like = abstract_model(config, mesh, rules=rules, dtype=dtype, param_dtype=param_dtype)
    wanted = flatten(like)
    places = leaf_places(wanted, config)
    _compare(path, places, wanted, stored)
    leaves: dict[KeyPath, jax.Array] = {}
    for group in _groups(by_memory(places).items(), lambda item: _nbytes(wanted[item[0]])):
        read = _read(path, {p.disk: _target(wanted[m], p) for m, rows in group for p in rows})
        leaves |= {m: read.pop(rows[0].disk) for m, rows in group if rows[0].row is None}
        parts = {m: [read[p.disk] for p in rows] for m, rows in group if m not in leaves}
        leaves |= _stack(parts, {m: wanted[m] for m in parts})
    return unflatten(leaves, like)


def abstract_model(
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    rules: Rules | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike = jnp.float32,
) -> Transformer:
    """A model of shapes: `jax.ShapeDtypeStruct` leaves that carry the sharding they shall get."""
    like = jax.eval_shape(
        lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)
    )
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


def _read(path: Path, targets: Mapping[KeyPath, jax.ShapeDtypeStruct]) -> dict[KeyPath, jax.Array]:
    try:
        with _orbax():
            return flatten(ocp.load(str(path / "params"), nest(targets)))
    except Exception as error:
        if len(targets) > 1:  # find the one that is damaged
            for name, target in targets.items():
                _read(path, {name: target})
        raise CheckpointError(
            f"{path} is damaged: could not read {'/'.join(next(iter(targets)))}: {_line(error)}"
        ) from error


def _stored_leaves(path: Path) -> dict[KeyPath, Any]:
    """Shape and dtype of each leaf on disk."""
    try:
        with _orbax():
            return flatten(ocp.metadata(str(path / "params")).metadata)
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged: could not read the list of parameters: {_line(error)}"
        ) from error


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


# --- small things ---------------------------------------------------------------------------------


@contextmanager
def _orbax() -> Iterator[None]:
    """Orbax with our options, and quiet about things that are as they should be."""
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.pytree.loading.partial_load = True
    with warnings.catch_warnings(), context:
        warnings.filterwarnings("ignore", module="orbax")
        yield


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise ValueError(
            f"checkpoint path {path}: only file systems that can rename a folder are supported; "
            "mount the bucket or copy from a local path"
        )
    return Path(path).absolute()


def _remove(folder: Path) -> None:
    """Removes what a failed save has written.

    When one of Orbax's writes fails, others may still be under way, and make the folder anew.
    """
    if jax.process_index() != 0:
        return
    quiet = 0
    for _ in range(100):
        quiet = 0 if folder.exists() else quiet + 1
        if quiet == 5:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def _sync_folder(path: Path) -> None:
    """Makes a rename in `path` survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
