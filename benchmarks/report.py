"""What a benchmark leaves behind: its rows, with what a reader needs to place them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.timing import environment


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--json [FILE]`."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="append one line of JSON to a file, or print it",
    )


def write(path: str | None, rates: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """Appends the rows, the matmul rates of the run and its environment, where `--json` was given.

    Args:
        path: of the option: None for nowhere, "-" for standard output.
        rates: TFLOP/s of a matmul.
        rows: what was measured.
    """
    if path is None:
        return
    line = json.dumps({"environment": environment(), "matmul": rates, "rows": rows})
    if path == "-":
        print(line)
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
