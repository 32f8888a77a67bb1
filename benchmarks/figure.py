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
    ("lightning_indexer", "#1b4f9c", "o", "lightning_indexer: scores and selection"),
    ("indexer_scores", "#d1495b", "s", "indexer_scores"),
    ("select_topk", "#2e8b57", "^", "select_topk, random scores"),
)


def rows_of(results: dict, op: str) -> list[dict]:
    """The rows that are drawn, by S; of several workspaces the least, which is the default."""
    found: dict[int, dict] = {}
    for row in results["rows"]:
        plain = row.get("kind", "random") == "random" and row.get("rows", 4096) == 4096
        if row["op"] == op and plain and row.get("topk", 2048) == 2048:
            best = found.setdefault(row["keys"], row)
            if row.get("workspace_bytes", 0) < best.get("workspace_bytes", 0):
                found[row["keys"]] = row
    return [found[keys] for keys in sorted(found)]


def points(results: dict, op: str) -> list[tuple[int, float]]:
    """S and milliseconds."""
    return [(row["keys"], row["ms"]) for row in rows_of(results, op)]


def ceiling(results: dict) -> list[tuple[int, float]]:
    """The time of the products alone at the rate of a matmul of the same run."""
    return [(r["keys"], r["of_matmul"] * r["ms"]) for r in rows_of(results, "indexer_scores")]


def shares(results: dict, op: str) -> list[tuple[int, float]]:
    """How close to the rate of a matmul of the same run."""
    return [(row["keys"], row["of_matmul"]) for row in rows_of(results, op)]


def draw_time(axes: Axes, results: dict) -> None:
    """Milliseconds, both axes logarithmic."""
    for op, color, marker, label in SERIES:
        some = points(results, op)
        axes.plot(*zip(*some, strict=True), color=color, marker=marker, ms=4, label=label)
        if op == "indexer_scores":  # its numbers would lie on the next line; the lower panel has it
            continue
        for keys, ms in some:
            axes.annotate(
                f"{ms:.3g}", (keys, ms), (0, 7), textcoords="offset points",
                ha="center", fontsize=7, color=color,
            )  # fmt: skip
    label = "the products alone at the e4m3 matmul rate"
    axes.plot(*zip(*ceiling(results), strict=True), "--", color="0.35", label=label)
    axes.set(yscale="log", ylabel="ms")
    axes.margins(y=0.09)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.legend(frameon=False, fontsize=8)


def draw_share(axes: Axes, results: dict) -> None:
    """How close to the matmul rate."""
    for op, color, marker, _ in SERIES[:2]:
        some = shares(results, op)
        axes.plot(*zip(*some, strict=True), color=color, marker=marker, ms=4)
        for keys, share in some:
            below = op == "lightning_indexer"
            axes.annotate(
                f"{share:.2f}", (keys, share), (0, -12 if below else 6), textcoords="offset points",
                ha="center", fontsize=7, color=color,
            )  # fmt: skip
    axes.axhline(1, ls="--", color="0.35")
    axes.set(ylim=(0.35, 1.08), ylabel="share of the matmul rate", xlabel="keys S", xscale="log")
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
    where = results["runs"][0]["environment"]
    panels[0].set_title(
        f"4096 queries at the end of S keys, 64 heads of 128, e4m3, K = 2048\n"
        f"one {where['gpu']}, jax {where['jax']}, {where['date']}; cold L2, device time",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
