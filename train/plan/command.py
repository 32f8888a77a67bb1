"""`python -m train plan`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from dsa_jax import presets
from train.plan.options import PlanOptions
from train.plan.plain import to_json
from train.plan.report import make
from train.plan.show import show


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if the run fits, 3 if it does not."""
    options = tyro.cli(
        PlanOptions,
        prog="python -m train plan",
        description=(
            "Says what a run takes before GPUs are rented: compiles its train step for so many "
            "GPUs on a machine that has none, and prints memory, collectives, operations, time, "
            f"and whether it fits. Presets: {', '.join(presets.names())}."
        ),
        args=list(sys.argv[1:] if arguments is None else arguments),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues),
    )
    progress = Console(stderr=True)
    with progress.status("planning") as status:
        report = make(options, lambda phase: status.update(phase))
    if options.json:
        print(json.dumps(to_json(report), indent=2))
    else:
        show(Console(), report)
    return 0 if report.fits else 3
