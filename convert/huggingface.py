"""Hugging Face checkpoints: a folder of safetensors files, an index, and `config.json`."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from convert.ours import DType, OurFolder, from_ours, tensors_out, to_ours
from convert.safetensors import (
    ConvertError,
    SafetensorsFile,
    SafetensorsWriter,
    TensorInfo,
    shard,
)
from dsa_jax.config import ModelConfig

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


class HuggingFaceFolder:
    """A published checkpoint, its headers read and nothing else.

    Args:
        folder: with `config.json` and either one safetensors file or an index and its files.

    Raises:
        FileNotFoundError: the folder, its config or a file of it is missing.
        ConvertError: files that contradict each other or themselves.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no checkpoint at {self.folder}: it is not a folder")
        self._files: dict[str, SafetensorsFile] = {}
        index = self.folder / INDEX
        names = _read_index(index) if index.is_file() else None
        files = (
            sorted(path.name for path in self.folder.glob("*.safetensors"))
            if names is None
            else sorted(set(names.values()))
        )
        if not files:
            raise ConvertError(f"{self.folder} holds no safetensors file")
        for file in files:
            self._open(file)
        if names is not None:
            self._check_index(index, names)

    def _open(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, but {INDEX} names it")
        file = SafetensorsFile(path)
        for tensor in file.tensors:
            if tensor in self._files:
                raise ConvertError(
                    f"duplicate tensor {tensor}: it is in {self._files[tensor].path} and in {path}"
                )
            self._files[tensor] = file

    def _check_index(self, index: Path, names: dict[str, str]) -> None:
        for tensor, file in names.items():
            if tensor not in self._files or self._files[tensor].path.name != file:
                raise ConvertError(f"{index} puts tensor {tensor} into {file}, which lacks it")
        for tensor, file in self._files.items():
            if tensor not in names:
                raise ConvertError(f"{file.path} holds tensor {tensor}, which {index} lacks")

    @cached_property
    def config(self) -> ModelConfig:
        """Of its `config.json`."""
        return ModelConfig.from_hf(self.folder)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Dtype and shape of every tensor."""
        return {name: file.tensors[name] for name, file in self._files.items()}

    def where(self, name: str) -> str:
        """A tensor, for messages."""
        return f"{self._files[name].path}: tensor {name}"

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor."""
        return self._files[name].read(name)

    def release(self, name: str) -> None:
        """Gives the memory of a tensor's pages back."""
        self._files[name].release(name)


def hf_to_orbax(
    source: str | Path, destination: str | Path, *, dtype: DType = "keep", mtp: bool = True
) -> ModelConfig:
    """Converts a Hugging Face checkpoint into one of this package.

    Args:
        source: the published folder.
        destination: the folder to make; refused if anything is there.
        dtype: of the weights; "keep" copies their bits, FP8 with its block scales.
        mtp: whether to carry the multi-token-prediction layers, where there are any.

    Returns:
        The config of what was written.

    Raises:
        FileNotFoundError: nothing at `source`.
        FileExistsError: something at `destination`.
        ConvertError: a source that contradicts its config or itself; nothing is written.
    """
    refuse_existing(destination)
    return to_ours(HuggingFaceFolder(source), destination, dtype=dtype, mtp=mtp)


def orbax_to_hf(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: DType = "keep",
    mtp: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> ModelConfig:
    """Converts a checkpoint of this package into a Hugging Face one.

    Args:
        source: a folder written by `dsa_jax.save` or by `hf_to_orbax`.
        destination: the folder to make; refused if anything is there.
        dtype: as for `hf_to_orbax`.
        mtp: likewise.
        shard_bytes: the most bytes of a file.

    Returns:
        The config of what was written.

    Raises: as `hf_to_orbax`.
    """
    refuse_existing(destination)
    folder = OurFolder(source, mtp=mtp)
    config, made = tensors_out(folder, dtype)
    tensors = [tensor for _, tensors in made for tensor in tensors]
    with HuggingFaceWriter(Path(destination), config, tensors, shard_bytes) as writer:
        from_ours(folder, [leaf for leaf, _ in made], config.fp8_weights, writer)
    return config


def refuse_existing(path: str | Path) -> None:
    """Raises FileExistsError if anything is at `path`."""
    if Path(path).exists():
        raise FileExistsError(f"{path} exists; choose another path or remove it first")


class HuggingFaceWriter:
    """Writes a folder of safetensors files, which appears only when the block ends well.

    Args:
        path: the folder to make.
        config: becomes `config.json`.
        tensors: all that will be written, in about the order they will come in.
        shard_bytes: the most bytes of a file.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        tensors: list[tuple[str, np.dtype, tuple[int, ...]]],
        shard_bytes: int = SHARD_BYTES,
    ):
        self.path = path
        self._folder = path.with_name(f"{path.name}.writing-{secrets.token_hex(4)}")
        self._config = config
        self._shards = shard(tensors, shard_bytes)
        count = len(self._shards)
        self._names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self._file = {name: i for i, content in enumerate(self._shards) for name in content}
        self._left = [len(content) for content in self._shards]
        self._open: dict[int, SafetensorsWriter] = {}

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True)
        return self

    def write(self, name: str, value: np.ndarray) -> None:
        """Writes a tensor, once."""
        i = self._file[name]
        if i not in self._open:
            self._open[i] = SafetensorsWriter(self._folder / self._names[i], self._shards[i])
        self._open[i].write(name, value)
        self._left[i] -= 1
        if not self._left[i]:
            self._open.pop(i).close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._open.values():
                file.close(complete=False)
            if self._folder.exists():
                shutil.rmtree(self._folder)

    def _finish(self) -> None:
        assert not any(self._left), "not all tensors were written"
        total = sum(
            math.prod(shape) * dtype.itemsize
            for content in self._shards
            for dtype, shape in content.values()
        )
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: self._names[i] for name, i in sorted(self._file.items())},
        }
        _write_json(self._folder / INDEX, index)
        _write_json(self._folder / "config.json", self._config.to_hf())
        refuse_existing(self.path)
        os.rename(self._folder, self.path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file name; only names of files in the same folder are taken."""
    try:
        names = json.loads(path.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConvertError(f"{path} is not an index: it needs a JSON weight_map") from error
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ConvertError(f"{path}: weight_map must lead from tensors to file names")
    for tensor, file in names.items():
        if Path(file).name != file or file in ("", ".", ".."):
            raise ConvertError(
                f"{path} puts tensor {tensor} into {file!r}, outside its own folder; refused"
            )
    return names
