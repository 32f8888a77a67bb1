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
from collections.abc import Iterable, Mapping
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

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor."""
        dtype, shape, start, end = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, end - start, start)
        return raw.view(dtype).reshape(shape)

    def release(self, name: str) -> None:
        """Gives the memory of a tensor's pages back; views of it stay valid and read it anew."""
        info = self.tensors[name]
        start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        if info.end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, info.end - start)


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
    """A file whose tensors are known beforehand and come in any order.

    Args:
        path: of the file to make.
        tensors: dtype and shape of each.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]):
        self.path = path
        # Wide types first: whatever the counts, every tensor is then aligned to its own width.
        order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name in order:
            dtype, shape = tensors[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            places[name] = start, end
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        self._infos = {
            n: TensorInfo(*tensors[n], base + start, base + end)
            for n, (start, end) in places.items()
        }
        self._missing = set(tensors)
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  (closed by `close`)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, value: np.ndarray) -> None:
        """Writes a tensor, once."""
        info = self._infos[name]
        assert (value.dtype, value.shape) == info[:2], (name, value.dtype, value.shape, info)
        self._missing.remove(name)
        view = memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        at = info.start
        while len(view):
            done = os.pwrite(self._file.fileno(), view, at)
            view, at = view[done:], at + done

    def close(self, *, complete: bool = True) -> None:
        """Ends the file; what is missing is a mistake of the caller."""
        assert not (complete and self._missing), sorted(self._missing)[:3]
        if complete:
            os.fsync(self._file.fileno())
        self._file.close()


def shard(
    tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]], limit: int
) -> list[dict[str, tuple[np.dtype, tuple[int, ...]]]]:
    """Deals tensors, in order, into files of at most `limit` bytes each (or one tensor)."""
    shards: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = []
    total = limit + 1
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        if total + size > limit:
            shards.append({})
            total = 0
        shards[-1][name] = dtype, shape
        total += size
    return shards
