"""`python -m train run | demo | evaluate`: one command a verb, each with its own `--help`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from dsa_jax import presets
from dsa_jax.config import ModelConfig
from train import cluster, launch
from train.config import TrainConfig
from train.supervise import INTERRUPTED, LOST, Worker, supervise

_USAGE = """usage: python -m train COMMAND ...

  run        train one stage: dense, warmup or sparse
  demo       train, sparsify, evaluate and report on real text
  evaluate   measure a trained model: losses, selection quality, controls
  plan       what a run takes, before GPUs are rented: memory, collectives, time, does it fit

python -m train COMMAND --help explains every field.
Exit status of run: 0 done, 1 error, 2 usage, 75 saved and stopped on request (run it again),
76 another process of the run was lost (run all again)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (given[0], given[1:]) if given else ("", [])
    if command in _COMMANDS:
        try:
            return _COMMANDS[command](rest)
        except Exception as error:
            if not _explained(error):
                raise
            _tell(str(error))
            return 1
    asked = command in ("-h", "--help")
    if not asked and command:
        print(f"no command {command!r}\n", file=sys.stderr)
    print(_USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The config that a command line describes.

    `--model NAME` takes the architecture from a preset, a `config.json` or a folder that holds one;
    `--model.FIELD` changes one field of it.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default="tiny")
    named, rest = first.parse_known_args(arguments)
    return tyro.cli(
        TrainConfig,
        prog="python -m train run",
        description=(
            "Trains one stage. --model NAME takes the architecture from a preset "
            f"({', '.join(presets.names())}), a config.json, or a folder that holds one "
            f"(now: {named.model}). A field that is None takes its stage's published value."
        ),
        args=list(rest),
        default=TrainConfig(model=_architecture(named.model)),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues),
    )


def _architecture(name: str) -> ModelConfig:
    if name in presets.names():
        return presets.get(name)
    path = Path(name)
    if path.exists():
        return ModelConfig.from_hf(path)
    raise ValueError(
        f"--model {name}: neither a file nor a preset; there are {', '.join(presets.names())}"
    )


def _run(arguments: Sequence[str]) -> int:
    config = parse(arguments)
    place = launch.detect(config.cluster, os.environ)
    if place is None:
        return _train(config)
    wait = config.cluster.start_timeout
    return supervise(place.name, wait, lambda worker: _train_together(config, place, worker))


def _train_together(config: TrainConfig, place: launch.Launch, worker: Worker) -> int:
    """One process's part of a run of several."""
    import jax

    try:
        cluster.join(place, config.cluster)
        worker.joined()
        code = _train(config)
    except cluster.AgreedError as error:
        if cluster.is_primary():
            _tell(str(error))
        code = 1
    except Exception as error:
        if cluster.tells_of_loss(error):
            _tell(
                f"{place.name}: another process of the run is lost, its own log says why (seen "
                f"here: {cluster.last_line(error)}). The checkpoints are whole: start all "
                "processes again to go on"
            )
            return LOST
        if not _explained(error):
            raise
        _tell(f"{place.name}: {error}")
        return 1  # at once: the others are waiting for this process, and end when it is gone
    jax.distributed.shutdown()
    return code


def _train(config: TrainConfig) -> int:
    from train.loop import train

    console = Console(stderr=True, quiet=not cluster.is_primary())
    result = train(config, console=console)
    console.print(f"metrics      {result.metrics_path}", highlight=False)
    console.print(f"checkpoints  {result.checkpoint_dir}", highlight=False)
    if result.interrupted:
        console.print(f"interrupted after step {result.step}: run the same command to go on")
        return INTERRUPTED
    console.print(f"model        {result.model_dir}", highlight=False)
    return 0


def _demo(arguments: Sequence[str]) -> int:
    from train import demo

    return demo.main(arguments)


def _evaluate(arguments: Sequence[str]) -> int:
    from train import evaluate

    return evaluate.main(arguments)


def _plan(arguments: Sequence[str]) -> int:
    from train.plan import command

    return command.main(arguments)


_COMMANDS = {"run": _run, "demo": _demo, "evaluate": _evaluate, "plan": _plan}


def _tell(message: str) -> None:
    console = Console(stderr=True)
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False, highlight=False)


def _explained(error: Exception) -> bool:
    """Whether the message says what to mend: this project raised it for the user, or the system
    refused a file and names it. Of any other error the traceback is what helps."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    house = Path(__file__).resolve().parent.parent
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(origin.is_relative_to(house / floor) for floor in ("train", "dsa_jax"))


if __name__ == "__main__":
    sys.exit(main())
