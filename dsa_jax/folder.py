"""Folders that appear at their path only when they are whole.

What is written goes to `<path>.writing-<token>`, which is renamed at the end. A crash, a full disk
or a kill leave nothing at the path itself; what a killed writer left beside it is removed by the
next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils


def local_path(path: str | Path) -> Path:
    """An absolute path of a file system that can rename a folder.

    Raises:
        ValueError: a bucket's address.
    """
    if "://" in str(path):
        raise ValueError(
            f"checkpoint path {path}: only file systems that can rename a folder are supported; "
            "mount the bucket or copy from a local path"
        )
    return Path(path).absolute()


def refuse_existing(path: str | Path) -> None:
    """Raises FileExistsError if anything is at `path`."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; choose another path or remove it first")


class NewFolder:
    """A folder being written; every process of a run opens the same one.

        with NewFolder(path) as new:
            ...                          # write into new.folder
                                         # it is at `path` when the block has ended well

    Args:
        path: where it shall appear; refused if anything is there.

    Raises:
        FileExistsError: `path` exists.
    """

    def __init__(self, path: str | Path):
        self.path = local_path(path)
        self.folder = self.path
        self._lock = -1

    def __enter__(self) -> Self:
        refuse_existing(self.path)
        token = secrets.randbits(32)
        if jax.process_count() > 1:
            token = int(multihost_utils.broadcast_one_to_all(np.uint32(token)))
        self.folder = self.path.with_name(f"{self.path.name}.writing-{token:08x}")
        self.folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._lock = _lock(self.folder)
                _remove_leftovers(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        whole = False
        try:
            if kind is None:
                self._finish()
                whole = True
        finally:
            if not whole and jax.process_index() == 0:
                _remove(self.folder)
            if self._lock >= 0:
                os.close(self._lock)

    def _finish(self) -> None:
        self.together("written")
        if jax.process_index() == 0:
            refuse_existing(self.path)
            os.rename(self.folder, self.path)
            _sync_folder(self.path.parent)
        self.together("renamed")

    def copy(self, files: Iterable[Path]) -> None:
        """Copies files into the folder, a tokenizer's for example."""
        if jax.process_index() == 0:
            for file in files:
                shutil.copyfile(file, self.folder / file.name)

    def together(self, moment: str) -> None:
        """Waits for the other processes to reach the same moment."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{self.folder.name} {moment}")


def write_json(path: Path, value: Any) -> None:
    """A new file, on the disk when this returns."""
    with open(path, "x", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _lock(folder: Path) -> int:
    """Marks a folder as being written, for as long as this process lives.

    Raises:
        OSError: another process has marked it, or the file system has no locks (what a kill leaves
            there is for its owner to remove).
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_leftovers(path: Path) -> None:
    """Removes what writers of `path` that are dead have left."""
    pattern = re.compile(re.escape(path.name) + r"\.writing-[0-9a-f]{8}")
    for folder in path.parent.iterdir():
        if not pattern.fullmatch(folder.name) or not folder.is_dir():
            continue
        try:
            descriptor = _lock(folder)
        except OSError:
            continue  # its writer lives, or has just finished
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Removes what a failed writer has written.

    When one of Orbax's writes fails, others may still be under way, and make the folder anew.
    """
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
