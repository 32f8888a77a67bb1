"""Which of the formats a folder is in."""

from __future__ import annotations

from pathlib import Path

from convert.huggingface import HuggingFaceFolder
from convert.inference_demo import DemoFolder
from convert.ours import OurFolder
from convert.source import Source


def open_checkpoint(folder: str | Path) -> tuple[str, Source]:
    """A checkpoint of any kind, and the name of its kind.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: none that this package reads, or a damaged one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {folder}: it is not a folder")
    if (folder / "params").is_dir():
        return "orbax", OurFolder(folder)
    if any(folder.glob("model*-mp*.safetensors")):
        return "demo", DemoFolder(folder)
    return "hf", HuggingFaceFolder(folder)
