"""Checkpoints of this package: read as a `Source`, and written leaf by leaf.

A leaf is cut over the processes of a run and, to bound what is on its way to the disk, over the
CPU devices of each: `Cut` says how. Each process reads, converts and writes its own part.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert import weights
from convert.progress import Progress
from convert.rules import Entry, entries, hf_scale
from convert.safetensors import ConvertError
from convert.source import DType, Leaf, Plan, Source, Tensor, converted, plan
from convert.weights import E4M3
from dsa_jax.config import ModelConfig
from dsa_jax.folder import refuse_existing
from dsa_jax.layer_tree import KeyPath, nest
from dsa_jax.store import CheckpointReader, CheckpointWriter

# Small leaves are written together: a write costs about a tenth of a second, whatever its size.
_GROUP_BYTES = 2**28
# Leaves are not cut into smaller pieces than this.
_PIECE_BYTES = 2**26
# For the scales of a leaf, and for what alignment leaves empty.
_SLACK_BYTES = 2**22
_THREADS = ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8))
# Of files that go with the weights.
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json")


def companions(folder: Path) -> list[Path]:
    """The small files of a checkpoint that a converter carries along."""
    return sorted(path for name in _COMPANIONS for path in folder.glob(name) if path.is_file())


class OurFolder:
    """A checkpoint of this package, under Hugging Face's names.

    Args:
        folder: written by `dsa_jax.save` or by a converter.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: not a checkpoint, or a damaged one.
        ConvertError: leaves that do not fit the config.
    """

    def __init__(self, folder: str | Path):
        self._reader = CheckpointReader(folder)
        self.folder = self._reader.path
        self.config = self._reader.config
        self.companions = companions(self.folder)
        self._tensors: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Entry, KeyPath, int]] = {}
        stored = dict(self._reader.leaves)
        for entry in entries(self.config):
            if (leaf := stored.pop(entry.path, None)) is None:
                continue
            self._check(entry.path, leaf.shape, entry.shape)
            self._add(entry, entry.path, entry.names, Tensor(leaf.dtype, entry.their_shape))
            if leaf.dtype == E4M3 and entry.scale_path in stored:
                if (fp8 := self.config.fp8_weights) is None:
                    raise ConvertError(f"{self.folder} has FP8 weights, but its config has none")
                scale = stored.pop(entry.scale_path)
                self._check(entry.scale_path, scale.shape, entry.scale_shape(fp8))
                names = tuple(map(hf_scale, entry.names))
                tensor = Tensor(scale.dtype, entry.their_scale_shape(fp8))
                self._add(entry, entry.scale_path, names, tensor)
        # What no rule names keeps its own name, for `plan` to refuse.
        self._tensors |= {"/".join(p): Tensor(x.dtype, x.shape) for p, x in stored.items()}
        self.tensors: Mapping[str, Tensor] = self._tensors
        self._held: dict[bool, tuple[KeyPath, np.ndarray]] = {}

    def __str__(self) -> str:
        return str(self.folder)

    def _check(self, path: KeyPath, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise ConvertError(
                f"{self.folder}: {'/'.join(path)} has shape {list(found)}, but its config asks for "
                f"{list(wanted)}"
            )

    def _add(self, entry: Entry, path: KeyPath, names: tuple[str, ...], tensor: Tensor) -> None:
        self._tensors |= dict.fromkeys(names, tensor)
        self._places |= {name: (entry, path, expert) for expert, name in enumerate(names)}

    def where(self, name: str) -> str:
        """File and leaf, for messages."""
        if name not in self._places:
            return f"{self.folder}: {name}"
        return f"{self.folder}: {'/'.join(self._places[name][1])} (tensor {name})"

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of a tensor; the leaf it belongs to is held until another is asked for."""
        entry, path, expert = self._places[name]
        is_scale = path != entry.path
        if is_scale not in self._held or self._held[is_scale][0] != path:
            self._held.pop(is_scale, None)  # before the next one is there
            self._held[is_scale] = path, self._reader.read_local(path)
        part = entry.part(self._held[is_scale][1], expert)[rows]
        # A copy: a view would keep the whole leaf in memory while the next one is read.
        found = np.empty(part.shape, part.dtype)
        weights.copy(found, part)
        return found


class Memory:
    """Memory that one leaf after the other lies in.

    To get memory from the system, and from a virtual machine's host, takes longer than to fill it.
    """

    def __init__(self, size: int):
        self._raw = np.empty(size, np.uint8)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array whose memory JAX can use as it is; from elsewhere if none is left."""
        size = math.prod(shape) * dtype.itemsize
        start = self._used + -(self._raw.ctypes.data + self._used) % 64
        if start + size > len(self._raw):
            raw = np.empty(size + 64, np.uint8)
            start = -raw.ctypes.data % 64
        else:
            raw, self._used = self._raw, start + size
        return raw[start : start + size].view(dtype).reshape(shape)

    def clear(self) -> None:
        """What was taken is no longer used."""
        self._used = 0


class Cut(NamedTuple):
    """How a leaf is cut: over processes along E or their rows, over devices along their columns."""

    sharding: NamedSharding
    scale_sharding: NamedSharding

    @classmethod
    def of(cls, leaf: Leaf, tile: int) -> Cut:
        """Even pieces where the shape has them; else every process has the whole."""
        shape = leaf.entry.shape
        devices = np.array(jax.devices("cpu")).reshape(jax.process_count(), -1)
        spec: list[str | None] = [None] * len(shape)
        rows = len(shape) - 1 if leaf.entry.transposed else 0
        along, unit = (0, 1) if leaf.entry.stacked else (rows, tile)
        if len(shape) > 1 and shape[along] % (len(devices) * unit) == 0:
            spec[along] = "process"
        whole = math.prod(shape) * leaf.wanted.itemsize
        pieces = 1
        if len(shape) > 1 and whole > _PIECE_BYTES:
            columns = len(shape) - 2 if leaf.entry.transposed else 1
            most = min(devices.shape[1], whole // _PIECE_BYTES)
            pieces = max(n for n in range(1, most + 1) if shape[columns] % n == 0)
            spec[columns] = "device"
        first = Mesh(devices[:, :1], ("process", "device"))
        mesh = Mesh(devices[:, :pieces], ("process", "device"))
        scale_spec = [axis if axis == "process" else None for axis in spec]
        return cls(
            NamedSharding(mesh, PartitionSpec(*spec)),
            NamedSharding(first, PartitionSpec(*scale_spec)),
        )


class _Parts:
    """This process's pieces of an array that is cut over devices."""

    def __init__(
        self,
        entry: Entry,
        shape: tuple[int, ...],
        dtype: np.dtype,
        where: NamedSharding,
        memory: Memory,
    ):
        self._entry, self._shape, self._where = entry, shape, where
        self._pieces = []
        for device, index in where.addressable_devices_indices_map(shape).items():
            assert index is not None
            ranges = [range(*i.indices(n)) for i, n in zip(index, shape, strict=True)]
            self._pieces.append((device, ranges, memory.take(tuple(map(len, ranges)), dtype)))

    @property
    def experts(self) -> range:
        """Those that this process has a part of; one for what is no stack."""
        return self._pieces[0][1][0] if self._entry.stacked else range(1)

    @property
    def rows(self) -> range:
        """Their rows that this process has a part of."""
        return self._theirs(self._pieces[0][1])[0]

    def _theirs(self, ranges: list[range]) -> list[range]:
        """Ranges along the axes of their tensor."""
        ranges = ranges[1:] if self._entry.stacked else ranges
        return ranges[::-1] if self._entry.transposed else ranges

    def put(self, expert: int, start: int, value: np.ndarray) -> None:
        """Takes rows `start`, ... of a tensor."""

        def put(piece: tuple[jax.Device, list[range], np.ndarray]) -> None:
            _, ranges, array = piece
            rows, *columns = self._theirs(ranges)
            part = self._entry.part(array, expert - self.experts.start)
            target = part[start - rows.start :][: len(value)]
            weights.copy(target, value[(..., *(slice(c.start, c.stop) for c in columns))])

        if len(self._pieces) == 1:
            put(self._pieces[0])
        else:  # NumPy copies without holding the interpreter's lock
            list(_THREADS.map(put, self._pieces))

    def join(self) -> jax.Array:
        """The array; it takes over the memory of the pieces."""
        arrays = [
            jax.device_put(array, device, may_alias=True) for device, _, array in self._pieces
        ]
        return jax.make_array_from_single_device_arrays(self._shape, self._where, arrays)


def to_ours(
    source: Source, path: str | Path, *, dtype: DType = "keep", mtp: bool = True
) -> ModelConfig:
    """Writes a checkpoint of this package; see `hf_to_orbax` for the arguments."""
    refuse_existing(path)
    todo = plan(source, dtype, mtp=mtp)
    with (
        CheckpointWriter(path, todo.config) as writer,
        Progress(f"writing {path}", todo.nbytes) as progress,
    ):
        writer.copy(source.companions)
        largest = max(math.prod(leaf.entry.shape) * leaf.wanted.itemsize for leaf in todo.leaves)
        memory = Memory((max(largest, _GROUP_BYTES) + _SLACK_BYTES) // jax.process_count())
        group: dict[KeyPath, jax.Array] = {}
        for leaf in todo.leaves:
            size = math.prod(leaf.entry.shape) * leaf.wanted.itemsize
            if group and sum(made.nbytes for made in group.values()) + size > _GROUP_BYTES:
                _write(writer, group, memory)
            group |= _make(source, todo, leaf, memory, progress)
        _write(writer, group, memory)
    return todo.config


def _write(writer: CheckpointWriter, group: dict[KeyPath, jax.Array], memory: Memory) -> None:
    """Writes leaves; their memory is then for others."""
    writer.write(nest(group))
    for leaf in group.values():
        leaf.delete()
    group.clear()
    memory.clear()


def _make(
    source: Source, todo: Plan, leaf: Leaf, memory: Memory, progress: Progress
) -> dict[KeyPath, jax.Array]:
    """The leaf, and its scales if it is in FP8."""
    entry = leaf.entry
    cut = Cut.of(leaf, todo.tile_rows)
    parts, scales = _Parts(entry, entry.shape, leaf.wanted, cut.sharding, memory), None
    if leaf.scales_out:
        assert todo.fp8 is not None
        shape = entry.scale_shape(todo.fp8)
        scales = _Parts(entry, shape, weights.F32, cut.scale_sharding, memory)
    for expert in parts.experts:
        for rows in converted(source, todo, leaf, entry.names[expert], parts.rows):
            parts.put(expert, rows.start, rows.value)
            if scales is not None:
                assert rows.scale is not None
                scales.put(expert, rows.scale_start, rows.scale)
            progress.add(rows.value.size * leaf.found.itemsize)
    made = {entry.path: parts.join()}
    return made if scales is None else made | {entry.scale_path: scales.join()}
