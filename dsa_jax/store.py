"""Checkpoints on disk, leaf by leaf: everything that needs Orbax.

    path/config.json            the architecture, as in Hugging Face's, numerics included
    path/params/                an Orbax checkpoint: embed_tokens/..., layers/0/..., layers/1/...
    path/tokenizer.json, ...    what a converter found beside the weights

Orbax's experimental interface and the place of its files are known here and nowhere else.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tensorstore

from dsa_jax.config import ModelConfig
from dsa_jax.folder import NewFolder, local_path, write_json
from dsa_jax.layer_tree import KeyPath, flatten, nest

# Larger leaves are stored in chunks of at most this many bytes, so that a device that needs a slice
# of a leaf does not read all of it.
_CHUNK_BYTES = 64 * 2**20
# Bytes on their way to the disk at a time: what a write needs in memory beyond what it writes.
_WRITE_BYTES = 2**29


class CheckpointError(ValueError):
    """A folder that is not a whole checkpoint of this package; the message says what is wrong."""


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
        self.path = local_path(path)
        self._config = config
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._new = self._stack.enter_context(NewFolder(self.path))
        except FileExistsError:
            raise
        except OSError as error:
            raise CheckpointError(f"could not save to {self.path}: {error}") from error
        return self

    def write(self, tree: Mapping[str, Any]) -> None:
        """Writes some leaves: nested dictionaries of `jax.Array` or `numpy.ndarray`."""
        try:
            with _orbax(tree):
                ocp.partial.save(str(self._new.folder / "params"), dict(tree))
        except Exception as error:
            raise self._failed(error) from error

    def copy(self, files: Iterable[Path]) -> None:
        """Copies files into the folder, a tokenizer's for example."""
        self._new.copy(files)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with self._stack:
                if kind is not None:
                    raise _Abandoned
                self._finish()
        except _Abandoned:
            return
        except Exception as failure:
            raise self._failed(failure) from failure

    def _finish(self) -> None:
        with _orbax():
            ocp.partial.finalize(str(self._new.folder / "params"))
        if jax.process_index() == 0:
            write_json(self._new.folder / "config.json", self._config.to_hf())

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"could not save to {self.path}, nothing is there: {_line(error)}")


class _Abandoned(Exception):
    """The block ended with an error of its own; what was written goes."""


class CheckpointReader:
    """A checkpoint leaf by leaf.

    Args:
        path: a folder written by `CheckpointWriter`.

    Attributes:
        path: the folder.
        config: the model's.
        leaves: shape and dtype of each leaf on disk.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: no checkpoint, or a damaged one.
    """

    def __init__(self, path: str | Path):
        self.path = local_path(path)
        self.config = load_config(path)
        try:
            with _orbax():
                stored = flatten(ocp.metadata(str(self.path / "params")).metadata)
        except Exception as error:
            raise CheckpointError(
                f"{self.path} is damaged: could not read the list of parameters: {_line(error)}"
            ) from error
        self.leaves = {
            name: jax.ShapeDtypeStruct(tuple(leaf.shape), jnp.dtype(leaf.dtype))
            for name, leaf in stored.items()
        }

    def read(self, targets: Mapping[KeyPath, jax.ShapeDtypeStruct]) -> dict[KeyPath, jax.Array]:
        """Leaves in the given dtypes and shardings; a process reads the slices of its devices.

        Raises:
            CheckpointError: a leaf is damaged; names it.
        """
        try:
            with _orbax():
                return flatten(ocp.load(str(self.path / "params"), nest(targets)))
        except Exception as error:
            if len(targets) > 1:  # find the one that is damaged
                for name, target in targets.items():
                    self.read({name: target})
            raise self._damaged(next(iter(targets)), error) from error

    def read_local(self, name: KeyPath) -> np.ndarray:
        """A whole leaf in this process's memory; the others need not take part.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            folders = [found.parent for found in (self.path / "params").glob("*/manifest.ocdbt")]
            spec = {
                "driver": "zarr3",
                "kvstore": {
                    "driver": "ocdbt",
                    "base": f"file://{folders[0]}/",
                    "path": f"{'.'.join(name)}/",
                },
                # Few chunks under way at a time: each is memory beyond the leaf.
                "context": {"file_io_concurrency": {"limit": 4}},
            }
            # Not `write` into an array of ours: it copies every chunk before it places the first.
            return tensorstore.open(spec, read=True).result().read().result()
        except Exception as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: KeyPath, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged: could not read {'/'.join(name)}: {_line(error)}"
        )


def load_config(path: str | Path) -> ModelConfig:
    """The config of a checkpoint.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: no checkpoint, or an unreadable config.
    """
    path = local_path(path)
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


@contextmanager
def _orbax(tree: Any = None) -> Iterator[None]:
    """Orbax with our options, and quiet about things that are as they should be.

    Args:
        tree: what is to be written, if anything.
    """
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    # Weights hardly get smaller: their low bits are noise.
    context.array.saving.use_compression = False
    # The limit must admit the largest piece.
    pieces = [_piece_bytes(leaf) for leaf in jax.tree.leaves(tree)]
    context.memory.write_concurrent_bytes = max([_WRITE_BYTES, *pieces])
    context.pytree.loading.partial_load = True
    with warnings.catch_warnings(), context:
        warnings.filterwarnings("ignore", module="orbax")
        yield


def _piece_bytes(leaf: Any) -> int:
    """Of a leaf, what one device holds."""
    shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def _line(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
