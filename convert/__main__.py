"""Checkpoints from one format to another: Hugging Face's, the inference demo's, this package's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from convert import compare as comparison
from convert import inspection
from convert.add_indexer import add_indexer
from convert.huggingface import SHARD_BYTES, hf_to_orbax, orbax_to_hf
from convert.inference_demo import demo_to_orbax, orbax_to_demo
from convert.source import DType

# Devices that a leaf is cut over, so that little of it is on its way to the disk at a time.
_CPU_DEVICES = 16


@dataclass(frozen=True)
class Conversion:
    """What all conversions take."""

    source: Annotated[Path, tyro.conf.Positional]
    """The checkpoint's folder."""
    destination: Annotated[Path, tyro.conf.Positional]
    """The folder to make; refused if anything is there."""
    dtype: DType = "keep"
    """Of the weights. `keep` copies their bits, FP8 with its block scales."""
    distributed: bool = False
    """Share the work with the other processes of this run: each runs the same command, and they
    find each other as `jax.distributed.initialize` does: by themselves on Slurm, Open MPI and
    Kubernetes, elsewhere by the three options below."""
    coordinator: str | None = None
    """With `distributed`: host:port of process 0."""
    num_processes: int | None = None
    """With `distributed`: how many there are."""
    process_id: int | None = None
    """With `distributed`: which this one is."""


@dataclass(frozen=True)
class _WithExtraLayers(Conversion):
    mtp: bool = True
    """Carry the multi-token-prediction layers, where there are any."""


@dataclass(frozen=True)
class HfToOrbax(_WithExtraLayers):
    """A Hugging Face checkpoint into one of this package."""

    def run(self) -> None:
        """Converts."""
        hf_to_orbax(self.source, self.destination, dtype=self.dtype, mtp=self.mtp)


@dataclass(frozen=True)
class OrbaxToHf(_WithExtraLayers):
    """A checkpoint of this package into a Hugging Face one."""

    shard_bytes: int = SHARD_BYTES
    """The most bytes of a file."""

    def run(self) -> None:
        """Converts."""
        orbax_to_hf(
            self.source,
            self.destination,
            dtype=self.dtype,
            mtp=self.mtp,
            shard_bytes=self.shard_bytes,
        )


@dataclass(frozen=True)
class DemoToOrbax(Conversion):
    """A checkpoint of DeepSeek's inference demo into one of this package."""

    config: Path | None = None
    """The model's config.json, Hugging Face's or the demo's own. None: the one in the folder."""

    def run(self) -> None:
        """Converts."""
        demo_to_orbax(self.source, self.destination, config=self.config, dtype=self.dtype)


@dataclass(frozen=True)
class OrbaxToDemo(Conversion):
    """A checkpoint of this package into one for DeepSeek's inference demo."""

    parallel: int = 1
    """GPUs that the demo shall run on: the number of files."""

    def run(self) -> None:
        """Converts."""
        orbax_to_demo(self.source, self.destination, parallel=self.parallel, dtype=self.dtype)


@dataclass(frozen=True)
class AddIndexer(_WithExtraLayers):
    """A dense DeepSeek-V3 checkpoint, in any format, into one of this package with indexers."""

    index_n_heads: int = 64
    """Heads of each indexer."""
    index_head_dim: int = 128
    """Their width."""
    index_topk: int = 2048
    """Keys that a query attends to."""
    seed: int = 0
    """Of the indexers' weights."""

    def run(self) -> None:
        """Converts."""
        add_indexer(
            self.source,
            self.destination,
            index_n_heads=self.index_n_heads,
            index_head_dim=self.index_head_dim,
            index_topk=self.index_topk,
            seed=self.seed,
            dtype=self.dtype,
            mtp=self.mtp,
        )


@dataclass(frozen=True)
class Inspect:
    """What a checkpoint of any format holds; fails if that is not what its config asks for."""

    source: Annotated[Path, tyro.conf.Positional]
    """The checkpoint's folder."""


@dataclass(frozen=True)
class Compare:
    """Transformers and this package side by side on a checkpoint: what differs, by which switch."""

    source: Annotated[Path, tyro.conf.Positional]
    """A Hugging Face checkpoint's folder; FP8 weights are compared dequantised."""
    dtype: comparison.Precision = "bf16"
    """In which both keep weights and compute."""
    length: int | None = None
    """Tokens a row. None: three times what the indexer selects, at most 4096."""
    batch: int = 1
    """Rows."""
    seed: int = 0
    """Of the tokens."""
    scratch: Path | None = None
    """Where copies of the checkpoint lie meanwhile. None: the system's folder for such files."""
    markdown: bool = False
    """Print the table as it stands in the documentation."""


type Command = (
    Annotated[HfToOrbax, tyro.conf.subcommand("hf-to-orbax")]
    | Annotated[OrbaxToHf, tyro.conf.subcommand("orbax-to-hf")]
    | Annotated[DemoToOrbax, tyro.conf.subcommand("demo-to-orbax")]
    | Annotated[OrbaxToDemo, tyro.conf.subcommand("orbax-to-demo")]
    | Annotated[AddIndexer, tyro.conf.subcommand("add-indexer")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    command = tyro.cli(Command, args=arguments, prog="dsa-convert", description=__doc__)
    console = Console(stderr=True)
    try:
        if isinstance(command, Inspect):
            found = inspection.inspect(command.source)
            inspection.show(found, Console())
            return 0 if found.ok else 1
        if isinstance(command, Compare):
            _compare(command, console)
            return 0
        _check_processes(command)
        if command.distributed:
            jax.distributed.initialize(
                command.coordinator, command.num_processes, command.process_id
            )
        command.run()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        console.print(f"[red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; what was written is removed", highlight=False)
        return 130
    if jax.process_index() == 0:
        console.print(f"wrote {command.destination}", highlight=False, markup=False)
    return 0


def _check_processes(command: Conversion) -> None:
    for name in ("coordinator", "num_processes", "process_id"):
        value = getattr(command, name)
        if value is not None and not command.distributed:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {value} says nothing without --distributed: add that")


def _compare(command: Compare, console: Console) -> None:
    with console.status("comparing") as status:
        lines = comparison.compare(
            command.source,
            dtype=command.dtype,
            length=command.length,
            batch=command.batch,
            seed=command.seed,
            scratch=command.scratch,
            report=status.update,
        )
    if command.markdown:
        print(comparison.markdown(lines))
    else:
        comparison.show(lines, Console())


def _on_the_cpu() -> None:
    """Keeps accelerators out of it; before the first use of JAX, which is why it is not `main`."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", _CPU_DEVICES)


def run() -> None:
    """The command-line program."""
    _on_the_cpu()
    sys.exit(main())


if __name__ == "__main__":
    run()
