"""Safetensors files: an 8-byte length, a JSON header, then the tensors' bytes.

The `safetensors` library needs torch for FP8, so this reads and writes the public format itself,
through memory maps. A header is not believed: every offset is checked against the file and against
the tensor's shape before anything is read, and nothing is allocated on its word.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes to fetch beyond what is asked for: most readers go on with the next tensor.
_AHEAD = 2**25
# The format's own limit on the header.
_HEADER_LIMIT = 100_000_000


class ConvertError(ValueError):
    """A checkpoint that cannot be converted; the message names the file and the tensor."""


class TensorInfo(NamedTuple):
    """Where a tensor lies in its file: bytes `start` to `end`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One file, mapped into memory; tensors are views of it.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: no such file.
        ConvertError: not a safetensors file, cut short, or with a header that contradicts itself.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self.tensors = read_header(self.path, file, os.fstat(file.fileno()).st_size)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._last: tuple[int, int] | None = None

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A read-only view of some rows; the memory of the view before it is given back."""
        dtype, shape, start, end = self.tensors[name]
        if self._last is not None:
            # The pages stay in the system's cache, but no longer count as this process's.
            self._map.madvise(mmap.MADV_DONTNEED, *self._last)
        view = np.frombuffer(self._map, np.uint8, end - start, start).view(dtype).reshape(shape)
        first, last, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
        width = (end - start) // shape[0] if shape and shape[0] else end - start
        at = (start + first * width) // mmap.PAGESIZE * mmap.PAGESIZE
        self._last = (at, start + last * width - at) if last > first else None
        if self._last is not None:
            # Have the disk fetch these rows, and those after them, before they are looked at.
            ahead = min(self._last[1] + _AHEAD, len(self._map) - at)
            self._map.madvise(mmap.MADV_WILLNEED, at, ahead)
        return view[rows] if shape else view


def read_header(path: Path, file: Any, size: int) -> dict[str, TensorInfo]:
    """The tensors of an open file of `size` bytes, in the order of their bytes.

    Raises:
        ConvertError: see `SafetensorsFile`.
    """
    if size < 8:
        raise ConvertError(f"{path} has {size} bytes: not a safetensors file, or cut short")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _HEADER_LIMIT):
        raise ConvertError(
            f"{path} says its header has {length} bytes, but the file has {size} (and a header at "
            f"most {_HEADER_LIMIT}): not a safetensors file, or cut short"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ConvertError(f"{path}: its header is a JSON {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    base = 8 + length
    found = {name: _tensor_info(path, name, item, base, size) for name, item in header.items()}
    found = dict(sorted(found.items(), key=lambda item: item[1][2:]))
    end = base
    for name, info in found.items():
        if info.start != end:
            raise ConvertError(
                f"{path}: tensor {name} starts at byte {info.start}, but the one before it ends at "
                f"{end}; tensors neither overlap nor leave gaps"
            )
        end = info.end
    if end != size:
        raise ConvertError(f"{path}: {size - end} bytes after the last tensor belong to none")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate tensor {twice}")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor_info(path: Path, name: str, item: Any, base: int, size: int) -> TensorInfo:
    where = f"{path}: tensor {name}"
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= item.keys():
        raise ConvertError(f"{where} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConvertError(f"{where} has dtype {dtype!r:.40}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_count, shape)):
        raise ConvertError(f"{where} has shape {shape!r:.80}, which is none")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ConvertError(f"{where} has data_offsets {offsets!r:.80}; they are two byte counts")
    start, end = base + offsets[0], base + offsets[1]
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != needed:
        raise ConvertError(
            f"{where} is {dtype}{shape!s:.80}, {needed!s:.40} bytes, but its data_offsets span "
            f"{end - start}"
        )
    if end > size:
        raise ConvertError(f"{where} ends at byte {end}, but the file has {size}: it is cut short")
    return TensorInfo(DTYPES[dtype], tuple(shape), start, end)


class SafetensorsWriter:
    """A new file whose tensors are known beforehand and come in any order, rows at a time.

    Args:
        path: of the file to make.
        tensors: dtype and shape of each.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]):
        # Wide types first: whatever the counts, every tensor is then aligned to its own width.
        order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        ends: dict[str, int] = {}
        end = 0
        for name in order:
            dtype, shape = tensors[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
            ends[name] = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        self._tensors = {
            name: TensorInfo(
                *tensors[name], base + header[name]["data_offsets"][0], base + ends[name]
            )
            for name in order
        }
        self._left = end
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  (closed by `close`)
        self._file.write(len(text).to_bytes(8, "little") + text)

    @property
    def complete(self) -> bool:
        """Whether all bytes have been written."""
        return self._left == 0

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes rows `start`, ... of a tensor; each is to be written once."""
        dtype, shape, first, last = self._tensors[name]
        assert (rows.dtype, rows.shape[1:]) == (dtype, shape[1:]), (name, rows.dtype, rows.shape)
        view = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        at = first + start * math.prod(shape[1:]) * dtype.itemsize
        assert at + len(view) <= last, (name, start, rows.shape, shape)
        self._left -= len(view)
        while len(view):
            done = os.pwrite(self._file.fileno(), view, at)
            view, at = view[done:], at + done

    def close(self) -> None:
        """Ends the file; a complete one is on the disk when this returns."""
        if self.complete:
            os.fsync(self._file.fileno())
        self._file.close()


def shard[Tensor: tuple[Any, ...]](
    tensors: Mapping[str, Tensor], limit: int
) -> list[dict[str, Tensor]]:
    """Deals tensors (dtype, shape), in order, into files of at most `limit` bytes or one tensor."""
    shards: list[dict[str, Tensor]] = []
    total = limit + 1
    for name, tensor in tensors.items():
        size = math.prod(tensor[1]) * tensor[0].itemsize
        if total + size > limit:
            shards.append({})
            total = 0
        shards[-1][name] = tensor
        total += size
    return shards
