"""Times ops by name: `python -m benchmarks.ops indexer topk fused --json results.json`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.timing import environment, matmul_rates

# Where an op's figures come from, and the matmul whose rate they are compared with. The function
# takes numbers of keys, and those at which to check; it yields a row per figure.
OPS = {
    "indexer": ("benchmarks.indexer:scores", "e4m3"),
    "topk": ("benchmarks.topk:rows", "e4m3"),
    "fused": ("benchmarks.indexer:fused", "e4m3"),
    "indexer_decode": ("benchmarks.indexer:decode", "e4m3"),
    "prefill": ("benchmarks.indexer:prefill", "e4m3"),
    "dense_attention": ("benchmarks.attention:forward", "bf16"),
    "dense_attention_grad": ("benchmarks.attention:backward", "bf16"),
    "indexer_kl_dense": ("benchmarks.indexer_loss:dense", "bf16"),
    "indexer_kl_sparse": ("benchmarks.indexer_loss:sparse", "bf16"),
    "indexer_kl_sparse_share": ("benchmarks.indexer_loss:sparse_share", "bf16"),
    "indexer_kl_sparse_training": ("benchmarks.indexer_loss:sparse_training", "bf16"),
    "grouped_matmul": ("benchmarks.grouped:products", "bf16"),
    "sparse_attention": ("benchmarks.sparse_attention:forward", "bf16"),
    "sparse_attention_decode": ("benchmarks.sparse_attention:decode", "bf16"),
    "sparse_attention_grad": ("benchmarks.sparse_attention_grad:rows", "bf16"),
    "sparse_attention_grad_training": ("benchmarks.sparse_attention_grad:training", "bf16"),
}


def function(name: str) -> Callable[[Sequence[int], Sequence[int]], Iterator[dict]]:
    """The function that times an op."""
    module, attribute = OPS[name][0].split(":")
    return getattr(importlib.import_module(module), attribute)


# What tells one figure from another; measured again, it replaces the old one.
IDENTITY = (
    *("op", "kind", "shape", "groups", "batch", "rows"),
    *("queries", "keys", "topk", "workspace_bytes"),
)


class Results:
    """The figures in a file: `runs`, of a process each, and `rows`, each with its run's number."""

    def __init__(self, path: Path | None):
        self.path = path
        found = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.runs: list[dict] = found.get("runs", [])
        self.rows: list[dict] = found.get("rows", [])

    def add(self, row: dict) -> None:
        """Adds a row of the last run, and replaces the file whole, so that it is never half one."""
        same = [self._identity(old) == self._identity(row) for old in self.rows]
        self.rows = [old for old, again in zip(self.rows, same, strict=True) if not again]
        self.rows.append({"run": len(self.runs) - 1} | row)
        if self.path is not None:
            new = self.path.with_suffix(self.path.suffix + ".new")
            lines = ",\n  ".join(json.dumps(row) for row in self.rows)
            runs = ",\n  ".join(json.dumps(run) for run in self.runs)
            new.write_text(f'{{"runs": [\n  {runs}\n],\n"rows": [\n  {lines}\n]}}\n')
            os.replace(new, self.path)

    @staticmethod
    def _identity(row: dict) -> list:
        return [row.get(name) for name in IDENTITY]


def main() -> None:
    """Runs the benchmarks that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="+", choices=OPS)
    usual = [8192, 32768, 131072]
    parser.add_argument("--keys", type=int, nargs="*", default=usual)
    parser.add_argument("--check", type=int, nargs="+", default=usual, help="keys to check at")
    parser.add_argument("--no-check", dest="check", action="store_const", const=[])
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to put the results, beside others"
    )
    options = parser.parse_args()
    results = Results(options.json)
    rates = matmul_rates()
    results.runs.append({"environment": environment(), "matmul_tflops": rates})
    print(json.dumps(results.runs[-1]), flush=True)
    for name in options.ops:
        for row in function(name)(options.keys, options.check):
            if "tflops" in row:
                row["of_matmul"] = round(row["tflops"] / rates[OPS[name][1]], 4)
            results.add(row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
