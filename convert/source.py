"""What every format looks like to the others: tensors under Hugging Face's names.

A `Source` is read tensor by tensor and in runs of rows, so that no format decides how much memory
another needs. `plan` compares it with its config before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from convert import weights
from convert.rules import Entry, entries, hf_scale
from convert.safetensors import ConvertError
from convert.weights import BF16, E4M3, F16, F32
from dsa_jax.config import Fp8Weights, ModelConfig

DType = Literal["keep", "bf16", "fp32", "fp8"]


class Tensor(NamedTuple):
    """A tensor without its numbers."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """A checkpoint to be read, under Hugging Face's names.

    Attributes:
        config: the model's.
        tensors: all there are.
        companions: small files that belong to it: the tokenizer's.
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    companions: list[Path]

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        ...

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of a tensor. What it returned before may no longer be used."""
        ...


@dataclass(frozen=True)
class Leaf:
    """A parameter on its way: what it is, and in which dtype it comes and goes."""

    entry: Entry
    found: np.dtype
    wanted: np.dtype

    @property
    def scales_in(self) -> bool:
        """Whether it comes with block scales."""
        return self.found == E4M3

    @property
    def scales_out(self) -> bool:
        """Whether it goes with block scales."""
        return self.wanted == E4M3


@dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    Attributes:
        config: of the result.
        leaves: in the order in which they are written.
        fp8: how FP8 weights are laid out, in the source or in the result; None without any.
        nbytes: to be read.
    """

    config: ModelConfig
    leaves: list[Leaf]
    fp8: Fp8Weights | None
    nbytes: int

    @property
    def tile_rows(self) -> int:
        """Rows that must be converted together; published tensors are `[out, in]`."""
        return self.fp8.weight_block_size[0] if self.fp8 is not None else 1

    def tensors(self, leaf: Leaf) -> dict[str, Tensor]:
        """What a leaf becomes under Hugging Face's names."""
        found = {}
        for name in leaf.entry.names:
            found[name] = Tensor(leaf.wanted, leaf.entry.their_shape)
            if leaf.scales_out:
                assert self.fp8 is not None
                found[hf_scale(name)] = Tensor(F32, leaf.entry.their_scale_shape(self.fp8))
        return found


def plan(source: Source, dtype: DType = "keep", *, mtp: bool = True) -> Plan:
    """Checks a source against its config, and decides what becomes of it.

    Args:
        source: what to read.
        dtype: of the weights; "keep" copies their bits.
        mtp: whether to carry multi-token-prediction layers, where the source has any.

    Raises:
        ConvertError: missing tensors, ones that the config does not know, wrong shapes or dtypes,
            FP8 weights without scales.
    """
    config, inventory = _inventory(source, mtp)
    leaves = []
    for entry in inventory:
        found = _found_dtype(source, entry)
        leaves.append(Leaf(entry, found, _wanted_dtype(entry.kind, dtype, found)))
    in_fp8 = _all_or_none_in_fp8(source, leaves)
    fp8 = config.fp8_weights or Fp8Weights((128, 128), "ue8m0")
    needs_fp8 = in_fp8 or any(leaf.scales_in for leaf in leaves)
    config = config.replace(fp8_weights=fp8 if in_fp8 else None)
    names = [name for entry in inventory for name in entry.names]
    names += [scale for name in names if (scale := hf_scale(name)) in source.tensors]
    nbytes = sum(source.tensors[name].nbytes for name in names)
    return Plan(config, leaves, fp8 if needs_fp8 else None, nbytes)


def _wanted_dtype(kind: str, dtype: DType, found: np.dtype) -> np.dtype:
    """FP8 checkpoints have bf16 beside the FP8; a few parameters are fp32 whatever the rest is."""
    if dtype == "keep":
        return found
    if dtype == "fp32" or kind == "fp32":
        return F32
    return E4M3 if dtype == "fp8" and kind == "matrix" else BF16


def _all_or_none_in_fp8(source: Source, leaves: list[Leaf]) -> bool:
    matrices = [leaf for leaf in leaves if leaf.entry.kind == "matrix"]
    in_fp8 = [leaf for leaf in matrices if leaf.scales_out]
    if in_fp8 and len(in_fp8) < len(matrices):
        other = next(leaf for leaf in matrices if not leaf.scales_out)
        raise ConvertError(
            f"{source.where(other.entry.names[0])} is {other.found}, but "
            f"{in_fp8[0].entry.names[0]} is in FP8; a model here has all its weights in FP8 or "
            "none. Convert with dtype bf16, fp32 or fp8"
        )
    return bool(in_fp8)


def _inventory(source: Source, mtp: bool) -> tuple[ModelConfig, tuple[Entry, ...]]:
    """The config, without extra layers that are not there or not wanted, and what it asks for."""
    config = source.config
    ignored: set[str] = set()
    if not mtp or not has_mtp(source):
        config, ignored = config.replace(num_nextn_predict_layers=0), _extra(config)
    inventory = entries(config)
    wanted = {name for entry in inventory for name in entry.names}
    scales = {hf_scale(n) for entry in inventory if entry.kind == "matrix" for n in entry.names}
    found = set(source.tensors) - ignored
    if missing := sorted(wanted - found):
        raise ConvertError(f"{source}: missing {_some(missing)}, which its config asks for")
    if left := sorted(found - wanted - scales):
        raise ConvertError(
            f"{source.where(left[0])} is not one its config knows"
            + (f"; nor {_some(left[1:])}" if left[1:] else "")
        )
    return config, inventory


def has_mtp(source: Source) -> bool:
    """Whether there is any tensor of a multi-token-prediction layer.

    Configs speak of such layers also where a checkpoint was saved without them.
    """
    return not _extra(source.config).isdisjoint(source.tensors)


def _extra(config: ModelConfig) -> set[str]:
    weights = [name for entry in entries(config) if entry.path[0] == "mtp" for name in entry.names]
    return {*weights, *map(hf_scale, weights)}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'tensors' if len(names) > 1 else 'tensor'} {', '.join(names[:3])}{more}"


def _found_dtype(source: Source, entry: Entry) -> np.dtype:
    """The one dtype of an entry's tensors, after checking them and their scales."""
    first = source.tensors[entry.names[0]].dtype
    known = (E4M3, BF16, F16, F32) if entry.kind == "matrix" else (BF16, F16, F32)
    if first not in known:
        raise ConvertError(f"{source.where(entry.names[0])} is {first}, which it cannot be")
    for name in entry.names:
        tensor = source.tensors[name]
        if tensor.shape != entry.their_shape:
            raise ConvertError(
                f"{source.where(name)} has shape {list(tensor.shape)}, but the config asks for "
                f"{list(entry.their_shape)}"
            )
        if tensor.dtype != first:
            raise ConvertError(
                f"{source.where(name)} is {tensor.dtype}, but {entry.names[0]} is {first}; the "
                "experts of a layer have one dtype"
            )
        _check_scale(source, entry, name)
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
    if scale != (F32, shape):
        raise ConvertError(
            f"{source.where(hf_scale(name))} is {scale.dtype}{list(scale.shape)}; the scales of "
            f"this weight are float32{list(shape)}"
        )


class Rows(NamedTuple):
    """Some rows of a tensor, converted, with their block scales if they are in FP8."""

    start: int
    value: np.ndarray
    scale_start: int
    scale: np.ndarray | None


def converted(
    source: Source, plan: Plan, leaf: Leaf, name: str, rows: range | None = None
) -> Iterator[Rows]:
    """A tensor in its new dtype, a few rows at a time.

    Args:
        source: where it is.
        plan: of the conversion.
        leaf: what it belongs to.
        name: of the tensor, one of the leaf's.
        rows: which, whole tiles of them; None is all.

    Raises:
        ConvertError: block scales that are no numbers.
    """
    shape = leaf.entry.their_shape
    tile = plan.tile_rows
    scales = scales_of(source, name) if leaf.scales_in else None
    for stripe in weights.stripes(rows or range(shape[0]), math.prod(shape[1:]), tile):
        blocks = slice(stripe.start // tile, -(-stripe.stop // tile))
        value, scale = weights.convert(
            source.read(name, stripe),
            None if scales is None else scales[blocks],
            leaf.wanted,
            plan.fp8,
        )
        yield Rows(stripe.start, value, blocks.start, scale)


def scales_of(source: Source, name: str) -> np.ndarray:
    """The block scales of a weight, checked: a NaN here would silence 128 x 128 weights.

    Raises:
        ConvertError: one is not a finite number >= 0.
    """
    scale = np.array(source.read(hf_scale(name), slice(None)))
    good = np.isfinite(scale) & (scale >= 0)
    if not good.all():
        raise ConvertError(
            f"{source.where(hf_scale(name))} holds {scale[~good][0]}; block scales are finite and "
            "not negative"
        )
    return scale
