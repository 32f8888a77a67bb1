"""Operations of the tensor cores in a training step, as the GPU's counters saw them.

    export XLA_FLAGS=--xla_gpu_enable_command_buffer=
    python -m benchmarks.plan_check predict --case sparse-8k-once --json FILE --programs FOLDER
    ncu --target-processes application-only --replay-mode application --cache-control none \
        --clock-control none --kernel-name 'regex:mosaic|gemm|nvjet|cutlass|xmma' --csv --page raw \
        --print-units base --metrics $(python -m benchmarks.tensor_operations metrics) \
        --log-file COUNTS.csv python -m benchmarks.plan_check count --steps 1 \
        --case sparse-8k-once --json FILE --programs FOLDER
    python -m benchmarks.tensor_operations add COUNTS.csv --row "sparse-8k-once h100" --json FILE

The whole program runs once for each pass over the counters, so that no memory is saved between
them; run alone, it takes 25 GB and 48 s on an H100.

`add` sums the counts of a step's kernels by part of the model, writes them into a row of
`benchmarks.plan_check`, and compares them with what the plan counts from the config. A kernel works
on whole tiles, also where half of one is masked, so it does somewhat more than is counted. The
router's product is in fp32 and not on the tensor cores.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path

METRICS = tuple(
    f"sm__ops_path_tensor_src_{kind}.sum" for kind in ("bf16_dst_fp32", "tf32_dst_fp32", "fp8")
)

# Parts of names of kernels, in the order in which they are looked for, and what they work for.
_KERNELS = (
    ("dense_attention_d", "attention, gradient"),
    ("dense_attention", "attention"),
    ("sparse_attention_forward", "attention"),
    ("sparse_attention_", "attention, gradient"),
    ("indexer_loss", "indexer"),
    ("indexer_", "indexer"),
    ("grouped_matmul", "experts"),
)
_PRODUCTS = "products with weights"


def part_of(kernel: str) -> str:
    """The part of the model that a kernel works for."""
    return next((part for name, part in _KERNELS if name in kernel), _PRODUCTS)


def counted_part(name: str) -> str:
    """The same of a part as `train.flops` names it."""
    if "attention" in name:
        return "attention, gradient" if "gradient" in name else "attention"
    if name.startswith("KL") or name == "indexer's scores":
        return "indexer"
    return "experts" if name == "experts" else _PRODUCTS


def by_part(lines: Iterable[str]) -> dict[str, float]:
    """Operations of each part, from what ncu writes with `--csv --page raw`.

    Raises:
        ValueError: no kernel is in there, or it was counted something else.
    """
    table = [line for line in lines if line.startswith('"')]
    rows = list(csv.DictReader(table))[1:]  # the first are the units
    missing = [name for name in METRICS if rows and name not in rows[0]]
    if not rows or missing:
        raise ValueError(f"not the counts of a step: no kernels, or without {missing}")
    sums: dict[str, float] = {}
    for row in rows:
        count = sum(float(row[name].replace(",", "") or 0) for name in METRICS)
        part = part_of(row["Kernel Name"])
        sums[part] = sums.get(part, 0.0) + count
    return {part: count for part, count in sums.items() if count}


def compare(counted: dict[str, float], seen: dict[str, float]) -> list[tuple[str, float, float]]:
    """Part, operations by the plan, operations by the counters; the last line is all of them."""
    said: dict[str, float] = {}
    for name, flop in counted.items():
        part = counted_part(name)
        said[part] = said.get(part, 0.0) + flop
    lines = [(part, said.get(part, 0.0), flop) for part, flop in seen.items()]
    return [*lines, ("all", sum(said.values()), sum(seen.values()))]


def main() -> None:
    """Names the metrics, or reads their counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("metrics")
    add = commands.add_parser("add")
    add.add_argument("counts", type=Path)
    add.add_argument("--row", required=True)
    add.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "metrics":
        print(",".join(METRICS))
        return
    rows = json.loads(given.json.read_text())
    row = rows[given.row]
    row["tensor_flop"] = by_part(given.counts.read_text().splitlines())
    for part, said, seen in compare(row["predicted"]["flop"], row["tensor_flop"]):
        print(f"{part:24} {said / 1e12:9.3f} {seen / 1e12:9.3f} TFLOP {said / seen - 1:+7.1%}")
    given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
