"""`python -m convert ...`: checkpoints from one format to another, on the console."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from convert.huggingface import hf_to_orbax, orbax_to_hf
from convert.ours import DType
from dsa_jax.config import ModelConfig


@dataclass(frozen=True)
class Conversion:
    """What all conversions take."""

    source: Annotated[Path, tyro.conf.Positional]
    """The checkpoint's folder."""
    destination: Annotated[Path, tyro.conf.Positional]
    """The folder to make; refused if anything is there."""
    dtype: DType = "keep"
    """Of the weights. `keep` copies their bits, FP8 with its block scales."""
    mtp: bool = True
    """Carry the multi-token-prediction layers, where there are any."""


@dataclass(frozen=True)
class HfToOrbax(Conversion):
    """A Hugging Face checkpoint into one of this package."""

    def run(self) -> ModelConfig:
        """Converts."""
        return hf_to_orbax(self.source, self.destination, dtype=self.dtype, mtp=self.mtp)


@dataclass(frozen=True)
class OrbaxToHf(Conversion):
    """A checkpoint of this package into a Hugging Face one."""

    def run(self) -> ModelConfig:
        """Converts."""
        return orbax_to_hf(self.source, self.destination, dtype=self.dtype, mtp=self.mtp)


type Command = (
    Annotated[HfToOrbax, tyro.conf.subcommand("hf-to-orbax")]
    | Annotated[OrbaxToHf, tyro.conf.subcommand("orbax-to-hf")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    command = tyro.cli(Command, args=arguments, prog="dsa-convert", description=__doc__)
    console = Console(stderr=True)
    try:
        command.run()
    except (ValueError, OSError) as error:
        console.print(f"[red]{type(error).__name__}[/]: {error}", highlight=False)
        return 1
    console.print(f"wrote {command.destination}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
