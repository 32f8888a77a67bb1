"""What the two writers of safetensors folders share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

from convert.safetensors import SafetensorsWriter
from dsa_jax.config import ModelConfig
from dsa_jax.folder import NewFolder


class FolderWriter(ABC):
    """A folder of safetensors files that appears only when the block ends well.

    Args:
        path: the folder to make.
        config: of the model that will be written.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path, config: ModelConfig):
        self._new = NewFolder(path)
        self.path = self._new.path
        self._config = config
        self._files: dict[int, SafetensorsWriter] = {}  # by number, those of this process

    def __enter__(self) -> Self:
        self._new.__enter__()
        return self

    def copy(self, files: list[Path]) -> None:
        """Copies files into the folder."""
        self._new.copy(files)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        try:
            if kind is None:
                assert all(file.complete for file in self._files.values()), "not all was written"
                if jax.process_index() == 0:
                    self._write_rest()
        except BaseException as failure:
            self._new.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._new.__exit__(kind, error, traceback)

    @abstractmethod
    def _write_rest(self) -> None:
        """What stands beside the tensors, written by one process."""
