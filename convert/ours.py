"""Between a checkpoint of this package and tensors under Hugging Face's names, leaf by leaf.

What the formats share: which tensors make which leaf, in which dtype, checked before anything is
written; and the stream of leaves, one at a time, so that memory is needed for the largest only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from convert import weights
from convert.progress import Progress
from convert.rules import Entry, entries, hf_scale, without_mtp
from convert.safetensors import ConvertError, TensorInfo
from convert.weights import BF16, E4M3, F32
from dsa_jax.checkpoint import CheckpointReader, CheckpointWriter
from dsa_jax.config import Fp8Weights, ModelConfig
from dsa_jax.layer_tree import KeyPath, name_difference, nest

DType = Literal["keep", "bf16", "fp32", "fp8"]
# Small leaves are written together: a write costs about a tenth of a second, whatever its size.
_GROUP_BYTES = 2**28


class Source(Protocol):
    """A checkpoint under Hugging Face's names."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...

    def where(self, name: str) -> str: ...

    def read(self, name: str) -> np.ndarray: ...

    def release(self, name: str) -> None: ...


@dataclass(frozen=True)
class Leaf:
    """A leaf to write: its entry, and in which dtype it comes and goes."""

    entry: Entry
    found: np.dtype
    wanted: np.dtype

    @property
    def nbytes(self) -> int:
        """Of what is written, scales aside."""
        return int(np.prod(self.entry.shape)) * self.wanted.itemsize


def wanted_dtype(kind: str, dtype: DType, found: np.dtype) -> np.dtype:
    """What becomes of a parameter: FP8 checkpoints have bf16 beside the FP8, norm of keys in fp32."""
    if dtype == "keep":
        return found
    if dtype == "fp32" or kind == "fp32":
        return F32
    return E4M3 if dtype == "fp8" and kind == "matrix" else BF16


def to_ours(
    source: Source, path: str | Path, *, dtype: DType = "keep", mtp: bool = True
) -> ModelConfig:
    """Writes a checkpoint of this package.

    Args:
        source: what to read.
        path: the folder to make.
        dtype: of the weights; "keep" copies their bits.
        mtp: whether to carry multi-token-prediction layers, where the source has any.

    Returns:
        The config of what was written.
    """
    config, leaves = plan(source, dtype, mtp)
    total = sum(_bytes_in(source, leaf) for leaf in leaves)
    with CheckpointWriter(path, config) as writer, Progress(f"writing {path}", total) as progress:
        group: dict[KeyPath, np.ndarray] = {}
        for leaf in leaves:
            if group and sum(v.nbytes for v in group.values()) + leaf.nbytes > _GROUP_BYTES:
                writer.write(nest(group))
                group = {}
            for name, value in _make(source, leaf, config.fp8_weights or source.config.fp8_weights):
                group[name] = value
            progress.add(_bytes_in(source, leaf))
        writer.write(nest(group))
    return config


def plan(source: Source, dtype: DType, mtp: bool) -> tuple[ModelConfig, list[Leaf]]:
    """What to write, and the config it will have; checks names, shapes, dtypes and scales.

    Raises:
        ConvertError: tensors that the config does not ask for, or not so.
    """
    config, inventory = _inventory(source, mtp)
    leaves = [
        Leaf(entry, found, wanted_dtype(entry.kind, dtype, found))
        for entry in inventory
        for found in [_found_dtype(source, entry)]
    ]
    in_fp8 = [leaf for leaf in leaves if leaf.entry.kind == "matrix" and leaf.wanted == E4M3]
    matrices = [leaf for leaf in leaves if leaf.entry.kind == "matrix"]
    if in_fp8 and len(in_fp8) < len(matrices):
        other = next(leaf for leaf in matrices if leaf.wanted != E4M3)
        raise ConvertError(
            f"{source.where(in_fp8[0].entry.names[0])} is in FP8, but "
            f"{source.where(other.entry.names[0])} is {other.found}; a model here has all its "
            "weights in FP8 or none. Convert with dtype bf16, fp32 or fp8"
        )
    fp8 = (config.fp8_weights or Fp8Weights((128, 128), "ue8m0")) if in_fp8 else None
    return config.replace(fp8_weights=fp8), leaves


def _inventory(source: Source, mtp: bool) -> tuple[ModelConfig, tuple[Entry, ...]]:
    config = source.config
    alone = without_mtp(config)
    extra = {name for entry in entries(config) if entry.path[0] == "mtp" for name in entry.names}
    extra |= {hf_scale(name) for name in extra}
    ignored: set[str] = set()
    if not (extra & source.tensors.keys()):
        config = alone
    elif not mtp:
        config, ignored = alone, extra
    inventory = entries(config)
    wanted = {name for entry in inventory for name in entry.names}
    scales = {hf_scale(n) for entry in inventory if entry.kind == "matrix" for n in entry.names}
    found = set(source.tensors) - ignored
    if missing := sorted(wanted - found):
        raise ConvertError(f"missing {_some(missing)}, which the config asks for")
    if left := sorted(found - wanted - scales):
        raise ConvertError(
            f"{source.where(left[0])} is not one the config knows"
            + (f", nor {_some(left[1:])}" if left[1:] else "")
        )
    return config, inventory


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'tensors' if len(names) > 1 else 'tensor'} {', '.join(names[:3])}{more}"


def _found_dtype(source: Source, entry: Entry) -> np.dtype:
    """The one dtype of an entry's tensors, after checking them and their scales."""
    first = source.tensors[entry.names[0]].dtype
    for name in entry.names:
        info = source.tensors[name]
        if info.shape != entry.their_shape:
            raise ConvertError(
                f"{source.where(name)} has shape {list(info.shape)}, but the config asks for "
                f"{list(entry.their_shape)}"
            )
        if info.dtype != first:
            raise ConvertError(
                f"{source.where(name)} is {info.dtype}, but {entry.names[0]} is {first}; experts "
                "of a layer have one dtype"
            )
        _check_scale(source, entry, name)
    if first not in (E4M3, BF16, F32, np.float16) or (first == E4M3 and entry.kind != "matrix"):
        raise ConvertError(f"{source.where(entry.names[0])} is {first}, which a weight here is not")
    return first


def _check_scale(source: Source, entry: Entry, name: str) -> None:
    scale, fp8 = source.tensors.get(hf_scale(name)), source.config.fp8_weights
    if source.tensors[name].dtype != E4M3:
        if scale is not None:
            raise ConvertError(f"{source.where(hf_scale(name))} scales a weight that is not in FP8")
        return
    if fp8 is None:
        raise ConvertError(
            f"{source.where(name)} is in FP8, but config.json has no quantization_config, which "
            "says how its scales are laid out"
        )
    if scale is None:
        raise ConvertError(f"{source.where(name)} is in FP8, but {hf_scale(name)} is missing")
    shape = entry.their_scale_shape(fp8)
    if (scale.dtype, scale.shape) != (F32, shape):
        raise ConvertError(
            f"{source.where(hf_scale(name))} is {scale.dtype}{list(scale.shape)}; the scales of "
            f"this weight are float32{list(shape)}"
        )


def _bytes_in(source: Source, leaf: Leaf) -> int:
    names = leaf.entry.names
    scales = [hf_scale(name) for name in names] if leaf.found == E4M3 else []
    return sum(info.end - info.start for info in map(source.tensors.__getitem__, [*names, *scales]))


def _make(
    source: Source, leaf: Leaf, fp8: Fp8Weights | None
) -> Iterator[tuple[KeyPath, np.ndarray]]:
    """The leaf, and its scales if it is in FP8."""
    entry = leaf.entry
    out = np.empty(entry.shape, leaf.wanted)
    scales = None
    if leaf.wanted == E4M3:
        assert fp8 is not None
        scales = np.empty(entry.scale_shape(fp8), np.float32)
    for e, name in enumerate(entry.names):
        scale = _read_scale(source, hf_scale(name)) if leaf.found == E4M3 else None
        target_scale = None if scales is None else theirs(entry, scales, e)
        weights.put(theirs(entry, out, e), target_scale, source.read(name), scale, fp8)
        source.release(name)
    yield entry.path, out
    if scales is not None:
        yield entry.scale_path, scales


def theirs(entry: Entry, leaf: np.ndarray, e: int) -> np.ndarray:
    """The part of a leaf that is tensor `e`, seen in the published layout."""
    part = leaf[e] if entry.stacked else leaf
    return part.T if entry.transposed else part


def _read_scale(source: Source, name: str) -> np.ndarray:
    """Block scales, which must be finite and not negative."""
    scale = source.read(name)
    if not (np.isfinite(scale) & (scale >= 0)).all():
        bad = scale[~(np.isfinite(scale) & (scale >= 0))][0]
        raise ConvertError(f"{source.where(name)} holds {bad}; block scales are positive numbers")
    return scale


class OurFolder:
    """A checkpoint of this package."""

    def __init__(self, folder: str | Path, *, mtp: bool = True):
        self.folder = Path(folder)
        self.reader = CheckpointReader(folder)
        stored = {
            path: leaf for path, leaf in self.reader.leaves.items() if mtp or path[0] != "mtp"
        }
        config = self.reader.config
        if not any(path[0] == "mtp" for path in stored):
            config = without_mtp(config)
        self.config = config
        self.entries = entries(config)
        wanted = {entry.path for entry in self.entries}
        wanted |= {entry.scale_path for entry in self.entries if stored_as(self, entry) == E4M3}
        if problem := name_difference(wanted, set(stored)):
            raise ConvertError(f"{folder} {problem}")
        for entry in self.entries:
            if stored[entry.path].shape != entry.shape:
                raise ConvertError(
                    f"{folder}: {entry} has shape {list(stored[entry.path].shape)}, but its config "
                    f"asks for {list(entry.shape)}"
                )


def stored_as(folder: OurFolder, entry: Entry) -> np.dtype | None:
    """The dtype of a parameter on disk."""
    leaf = folder.reader.leaves.get(entry.path)
    return None if leaf is None else leaf.dtype


class Target(Protocol):
    """A checkpoint under Hugging Face's names, being written."""

    def write(self, name: str, value: np.ndarray) -> None: ...


def tensors_out(
    folder: OurFolder, dtype: DType
) -> tuple[ModelConfig, list[tuple[Leaf, list[tuple[str, np.dtype, tuple[int, ...]]]]]]:
    """The tensors that leaves become, in the order of the leaves, and the config they get."""
    leaves = []
    for entry in folder.entries:
        found = stored_as(folder, entry)
        assert found is not None
        leaves.append(Leaf(entry, found, wanted_dtype(entry.kind, dtype, found)))
    config = folder.config
    in_fp8 = any(leaf.wanted == E4M3 for leaf in leaves)
    fp8 = (config.fp8_weights or Fp8Weights((128, 128), "ue8m0")) if in_fp8 else None
    config = config.replace(fp8_weights=fp8)
    made = []
    for leaf in leaves:
        tensors = []
        for name in leaf.entry.names:
            tensors.append((name, leaf.wanted, leaf.entry.their_shape))
            if leaf.wanted == E4M3:
                assert fp8 is not None
                tensors.append((hf_scale(name), F32, leaf.entry.their_scale_shape(fp8)))
        made.append((leaf, tensors))
    return config, made


def from_ours(
    folder: OurFolder, leaves: list[Leaf], fp8: Fp8Weights | None, target: Target
) -> None:
    """Streams a checkpoint of this package, leaf by leaf."""
    total = sum(math.prod(leaf.entry.shape) * leaf.found.itemsize for leaf in leaves)
    with Progress(f"reading {folder.folder}", total) as progress:
        for leaf in leaves:
            entry = leaf.entry
            value = folder.reader.read(entry.path)
            scales = folder.reader.read(entry.scale_path) if leaf.found == E4M3 else None
            for e, name in enumerate(entry.names):
                out = np.empty(entry.their_shape, leaf.wanted)
                scale = None
                if leaf.wanted == E4M3:
                    assert fp8 is not None
                    scale = np.empty(entry.their_scale_shape(fp8), np.float32)
                given = None if scales is None else theirs(entry, scales, e)
                weights.put(out, scale, theirs(entry, value, e), given, fp8)
                target.write(name, out)
                if scale is not None:
                    target.write(hf_scale(name), scale)
            progress.add(math.prod(entry.shape) * leaf.found.itemsize)
