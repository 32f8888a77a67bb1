"""Draws a token's attention cost against its position, beside the report's figure.

    python -m benchmarks.position_figure FIGURE.png FILE

from what `benchmarks.positions` wrote.

The report is DeepSeek-V3.2-Exp's; its Figure 3 gives the cost of a whole service on H800s in
dollars per million tokens, two straight lines in each panel, whose ends are copied here. They are
scaled by one factor a panel, so that dense attention agrees at 128K: only shapes can be compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

K = 1024
# Position and dollars per million tokens, read off the report's Figure 3: the ends and the knee.
REPORT = {
    "prefill": {
        "dense": ((0, 0.053), (128 * K, 0.666)),
        "sparse": ((0, 0.061), (6.6 * K, 0.100), (128 * K, 0.187)),
    },
    "decode": {
        "dense": ((0, 0.070), (128 * K, 2.154)),
        "sparse": ((0, 0.095), (2.06 * K, 0.146), (128 * K, 0.249)),
    },
}
DENSE, SPARSE = "#3a3a3a", "#0072b2"


def series(results: dict, mode: str, part: str) -> dict[int, float]:
    """Microseconds a token by position."""
    kind = f"{mode} {part}"
    found = {r["keys"]: r["us_per_token"] for r in results["rows"] if r.get("kind") == kind}
    return dict(sorted(found.items()))


def sparse(results: dict, mode: str) -> dict[int, float]:
    """DSA: the indexer's selection and the attention over what it selects."""
    attention, indexer = series(results, mode, "sparse"), series(results, mode, "indexer")
    return {t: us + attention[t] for t, us in indexer.items() if t in attention}


def factor(results: dict, mode: str) -> float:
    """Microseconds for a dollar, by which the two dense lines agree at 128K."""
    return series(results, mode, "dense")[128 * K] / REPORT[mode]["dense"][-1][1]


def _xy(points: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())


def draw(axes: Axes, results: dict, mode: str) -> None:
    """One panel."""
    for name, points, color in (
        ("dense", series(results, mode, "dense"), DENSE),
        ("sparse", sparse(results, mode), SPARSE),
    ):
        label = "dense MLA" if name == "dense" else "DSA: indexer and sparse attention"
        axes.plot(*_xy(points), "o-", color=color, label=f"{label}, measured")
        scale = factor(results, mode)
        x, y = zip(*REPORT[mode][name], strict=True)
        service = "V3.1-Terminus" if name == "dense" else "V3.2-Exp"
        label = f"report, {service}, scaled"
        axes.plot(x, [scale * v for v in y], "--", color=color, alpha=0.6, label=label)
    axes.plot(
        *_xy(series(results, mode, "indexer")), ":", color=SPARSE, label="of DSA, the indexer"
    )
    last = 128 * K
    ratio = series(results, mode, "dense")[last] / sparse(results, mode)[last]
    (_, dense), exp = REPORT[mode]["dense"][-1], REPORT[mode]["sparse"][-1][1]
    axes.set_title(
        f"{mode}: at {last // K}K dense ÷ DSA = {ratio:.1f} (report: {dense / exp:.1f})", fontsize=9
    )
    ticks = [0, 32 * K, 64 * K, 96 * K, 128 * K]
    axes.set_xticks(ticks, [f"{t // K}K" for t in ticks])
    axes.set(xlabel="position of the token", ylim=(0, None), xlim=(0, None))
    axes.set_ylabel("µs a token, one layer's attention")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7)


def main() -> None:
    """Draws one figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figure", type=Path)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    figure, panels = plt.subplots(1, len(REPORT), figsize=(12.4, 4.6))
    for axes, mode in zip(panels, REPORT, strict=True):
        draw(axes, results, mode)
    where = results["runs"][-1]["environment"]
    figure.suptitle(
        f"Attention of one layer of DeepSeek-V3.2-Exp on one {where['gpu']}, jax {where['jax']}, "
        f"{where['date']};\nthe report's lines are of a whole service, on other machines",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
