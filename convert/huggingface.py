"""Hugging Face checkpoints: a folder of safetensors files, an index, and `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from convert.folder_writer import FolderWriter
from convert.ours import OurFolder, companions, to_ours
from convert.progress import Progress
from convert.rules import hf_scale
from convert.safetensors import ConvertError, SafetensorsFile, SafetensorsWriter, shard
from convert.source import DType, Plan, Source, Tensor, converted, plan
from dsa_jax.config import ModelConfig
from dsa_jax.folder import refuse_existing, write_json

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def hf_to_orbax(
    source: str | Path, destination: str | Path, *, dtype: DType = "keep", mtp: bool = True
) -> ModelConfig:
    """Converts a Hugging Face checkpoint into one of this package.

    In a run of several processes all call it, and each does its part.

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
        ConvertError: a source that contradicts its config or itself. Nothing is at `destination`
            then, nor after any other error.
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
        source: a folder written by `dsa_jax.save` or by a converter.
        destination: the folder to make; refused if anything is there.
        dtype: as for `hf_to_orbax`.
        mtp: likewise.
        shard_bytes: the most bytes of a file.

    Returns:
        The config of what was written.

    Raises:
        FileNotFoundError: nothing at `source`.
        FileExistsError: something at `destination`.
        ConvertError: `shard_bytes` below 1.
        CheckpointError: a damaged source. Nothing is at `destination` then.
    """
    if shard_bytes < 1:
        raise ConvertError(f"shard_bytes={shard_bytes} must be at least 1")
    refuse_existing(destination)
    folder = OurFolder(source)
    todo = plan(folder, dtype, mtp=mtp)
    with HuggingFaceWriter(destination, todo, shard_bytes) as writer:
        writer.copy(folder.companions)
        write_tensors(folder, todo, writer)
    return todo.config


class Writer(Protocol):
    """A checkpoint being written, under Hugging Face's names."""

    path: Path

    def takes(self, name: str) -> bool:
        """Whether any of a tensor is this process's to write."""
        ...

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes rows `start`, ... of a tensor."""
        ...


def write_tensors(source: Source, todo: Plan, writer: Writer) -> None:
    """Streams the tensors that are this process's to write."""
    nbytes = todo.nbytes // jax.process_count()
    with Progress(f"writing {writer.path}", nbytes) as progress:
        for leaf in todo.leaves:
            for name in leaf.entry.names:
                if not writer.takes(name):
                    continue
                for rows in converted(source, todo, leaf, name):
                    writer.write(name, rows.start, rows.value)
                    if rows.scale is not None:
                        writer.write(hf_scale(name), rows.scale_start, rows.scale)
                    progress.add(rows.value.size * leaf.found.itemsize)


class HuggingFaceFolder:
    """A published checkpoint; of its weights only the headers are read at first.

    Args:
        folder: with `config.json` and either an index and its files, or safetensors files alone.

    Raises:
        FileNotFoundError: the folder, its config or a file of it is missing.
        ValueError: a config that this package does not build.
        ConvertError: files that contradict each other or themselves.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no checkpoint at {self.folder}: it is not a folder")
        self.config = ModelConfig.from_hf(self.folder)
        self.companions = companions(self.folder)
        self._files: dict[str, SafetensorsFile] = {}
        index = self.folder / INDEX
        names = _read_index(index) if index.is_file() else None
        if names is None:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        else:
            files = sorted(set(names.values()))
        if not files:
            raise ConvertError(f"{self.folder} holds no safetensors file")
        for file in files:
            self._open(file)
        if names is not None:
            self._check_index(index, names)
        self.tensors: Mapping[str, Tensor] = {
            name: Tensor(*file.tensors[name][:2])
            for name, file in self._files.items()
            if not name.endswith("rotary_emb.inv_freq")  # old exports have it; it is computed
        }

    def __str__(self) -> str:
        return str(self.folder)

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

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        return f"{self._files[name].path}: tensor {name}"

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of a tensor; what was returned before may no longer be used."""
        return self._files[name].read(name, rows)


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


class HuggingFaceWriter(FolderWriter):
    """Writes a folder of safetensors files, which appears only when the block ends well.

    Of a run of several processes each writes files of its own.

    Args:
        path: the folder to make.
        todo: what will be written.
        shard_bytes: the most bytes of a file (but a tensor is in one file).
    """

    def __init__(self, path: str | Path, todo: Plan, shard_bytes: int = SHARD_BYTES):
        super().__init__(path, todo.config)
        self._shards: list[dict[str, Tensor]] = []
        self._owner: list[int] = []
        for process, share in enumerate(_shares(todo, jax.process_count())):
            made = shard(share, shard_bytes)
            self._shards += made
            self._owner += [process] * len(made)
        count = len(self._shards)
        self._names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self._file = {name: i for i, tensors in enumerate(self._shards) for name in tensors}

    def takes(self, name: str) -> bool:
        """Whether a tensor is this process's to write."""
        return self._owner[self._file[name]] == jax.process_index()

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes rows `start`, ... of a tensor."""
        i = self._file[name]
        if i not in self._files:
            path = self._new.folder / self._names[i]
            self._files[i] = SafetensorsWriter(path, self._shards[i])
        self._files[i].write(name, start, rows)
        if self._files[i].complete:
            self._files.pop(i).close()

    def _write_rest(self) -> None:
        total = sum(tensor.nbytes for tensors in self._shards for tensor in tensors.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: self._names[i] for name, i in sorted(self._file.items())},
        }
        write_json(self._new.folder / INDEX, index)
        write_json(self._new.folder / "config.json", self._config.to_hf())


def _shares(todo: Plan, count: int) -> list[dict[str, Tensor]]:
    """Runs of leaves of about equal size, one for each process; a leaf has one reader."""
    leaves = [todo.tensors(leaf) for leaf in todo.leaves]
    sizes = np.cumsum([sum(tensor.nbytes for tensor in tensors.values()) for tensors in leaves])
    shares: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for tensors, end in zip(leaves, sizes, strict=True):
        shares[min(int((end - 1) * count // sizes[-1]), count - 1)] |= tensors
    return shares
