"""Draws time against S from what `benchmarks.ops indexer topk fused --json` wrote."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter

# What is drawn: which op, in which colour and with which name.
SERIES = (
    ("fused", "#1b4f9c", "o", "lightning_indexer: scores and selection"),
    ("indexer", "#d1495b", "s", "indexer_scores"),
    ("topk", "#2e8b57", "^", "select_topk, random scores"),
)


def points(results: dict, op: str) -> list[tuple[int, float]]:
    """S and milliseconds; of several workspaces the default, which comes first."""
    found: dict[int, float] = {}
    for row in results[op]["rows"]:
        plain = row.get("kind", "random") == "random" and row.get("rows", 4096) == 4096
        if plain and row.get("topk", 2048) == 2048:
            found.setdefault(row["keys"], row["ms"])
    return sorted(found.items())


def ceiling(results: dict) -> list[tuple[int, float]]:
    """The time of the products alone at the rate of a matmul of the same run."""
    rate = results["indexer"]["matmul_tflops"]["e4m3"]
    return [(r["keys"], r["tflops"] * r["ms"] / rate) for r in results["indexer"]["rows"]]


def draw_time(axes: Axes, results: dict) -> None:
    """Milliseconds, both axes logarithmic."""
    for op, color, marker, label in SERIES:
        some = points(results, op)
        axes.plot(*zip(*some, strict=True), color=color, marker=marker, ms=4, label=label)
        if op == "indexer":  # its numbers would lie on the next line; the lower panel has it
            continue
        for keys, ms in some:
            axes.annotate(
                f"{ms:.3g}", (keys, ms), (0, 7), textcoords="offset points",
                ha="center", fontsize=7, color=color,
            )  # fmt: skip
    rate = results["indexer"]["matmul_tflops"]["e4m3"]
    label = f"the products alone at the e4m3 matmul rate ({rate:.0f} TFLOP/s)"
    axes.plot(*zip(*ceiling(results), strict=True), "--", color="0.35", label=label)
    axes.set(yscale="log", ylabel="ms")
    axes.margins(y=0.09)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.legend(frameon=False, fontsize=8)


def draw_share(axes: Axes, results: dict) -> None:
    """How close to the matmul rate."""
    floor = dict(ceiling(results))
    for op, color, marker, _ in SERIES[:2]:
        shares = [(keys, floor[keys] / ms) for keys, ms in points(results, op)]
        axes.plot(*zip(*shares, strict=True), color=color, marker=marker, ms=4)
        for keys, share in shares:
            axes.annotate(
                f"{share:.2f}", (keys, share), (0, 6), textcoords="offset points",
                ha="center", fontsize=7, color=color,
            )  # fmt: skip
    axes.axhline(1, ls="--", color="0.35")
    axes.set(ylim=(0.4, 1.08), ylabel="share of the matmul rate", xlabel="keys S", xscale="log")
    axes.xaxis.set_major_locator(FixedLocator([keys for keys, _ in points(results, SERIES[0][0])]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda keys, _: f"{keys / 1024:.0f}K"))
    axes.xaxis.set_minor_locator(FixedLocator([]))


def main() -> None:
    """Draws one figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    figure, panels = plt.subplots(2, 1, figsize=(7.2, 7), sharex=True, height_ratios=(3, 2))
    draw_time(panels[0], results)
    draw_share(panels[1], results)
    for axes in panels:
        axes.grid(alpha=0.25)
    where = results["fused"]["environment"]
    panels[0].set_title(
        f"4096 queries at the end of S keys, 64 heads of 128, e4m3, K = 2048\n"
        f"one {where['gpu']}, jax {where['jax']}, {where['date']}; cold L2, device time",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
