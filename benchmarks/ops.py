"""Times ops by name: `python -m benchmarks.ops indexer topk fused --json results.json`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.timing import environment, matmul_rates

# An op's function takes numbers of keys, and those at which to check; it yields a row per figure.
OPS = {
    "indexer": "benchmarks.indexer:scores",
    "topk": "benchmarks.topk:rows",
    "fused": "benchmarks.indexer:fused",
    "prefill": "benchmarks.indexer:prefill",
}


def function(name: str) -> Callable[[Sequence[int], Sequence[int]], Iterator[dict]]:
    """The function that times an op."""
    module, attribute = OPS[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def write(path: Path, results: dict) -> None:
    """Replaces the file whole, so that a run that is cut short leaves what it had."""
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, path)


def read(path: Path | None) -> dict:
    """What earlier runs left: the ops that are not run again stay."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def main() -> None:
    """Runs the benchmarks that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="+", choices=OPS)
    usual = [8192, 32768, 131072]
    parser.add_argument("--keys", type=int, nargs="*", default=usual)
    parser.add_argument("--check", type=int, nargs="*", default=usual, help="keys to check at")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to put the results, beside other ops'"
    )
    options = parser.parse_args()
    rates, where = matmul_rates(), environment()
    print(json.dumps({"environment": where, "matmul_tflops": rates}), flush=True)
    results = read(options.json)
    for name in options.ops:
        rows: list[dict] = []
        results[name] = {"environment": where, "matmul_tflops": rates, "rows": rows}
        for row in function(name)(options.keys, options.check):
            if "tflops" in row:
                row["of_matmul"] = round(row["tflops"] / rates["e4m3"], 4)
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.json:
                write(options.json, results)


if __name__ == "__main__":
    main()
