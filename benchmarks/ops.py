"""Times ops by name: `python -m benchmarks.ops topk indexer`; the rest of the line goes to each."""

from __future__ import annotations

import runpy
import sys

MODULES = {
    "indexer": ("benchmarks.indexer", ["scores"]),
    "fused": ("benchmarks.indexer", ["fused"]),
    "topk": ("benchmarks.topk", []),
    "sparse_attention_grad": ("benchmarks.sparse_attention_grad", []),
}


def main() -> None:
    """Runs the benchmarks that the first arguments name."""
    arguments = sys.argv[1:]
    names = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments.pop(0))
    unknown = [name for name in names if name not in MODULES]
    if unknown or not names:
        sys.exit(f"name ops to time, of {', '.join(MODULES)}; unknown: {unknown}")
    for name in names:
        module, first = MODULES[name]
        sys.argv = [module, *first, *arguments]
        runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
