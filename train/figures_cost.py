"""Two of the demo's figures: a selection beside the teacher it imitates, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from train.cost import LayerShape
from train.figure_style import COLORS, size_label

Results = Mapping[str, Any]


def selection(results: Results, snapshot: Mapping[str, np.ndarray]) -> Figure:
    """One layer of one held-out row: the teacher's mass, and which of it the indexer keeps."""
    target, chosen = snapshot["target"], snapshot["chosen"]
    layer = int(results["snapshot_layer"])
    length = target.shape[1]
    seen = np.tril(np.ones((length, length), bool))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 5.8), layout="constrained")
    colors = plt.get_cmap("magma_r").with_extremes(under="white", bad="#f2f2f2")
    shown = np.where(seen, np.maximum(target[layer], 1e-9), np.nan)
    image = left.imshow(shown, norm=LogNorm(5e-3, 1), cmap=colors, interpolation="nearest")
    figure.colorbar(image, ax=left, label="attention mass p", shrink=0.75, extend="min")
    left.set(title=f"Layer {layer}: where the teacher looks")
    right.imshow(_kept_and_missed(target[layer], chosen[layer], seen), interpolation="nearest")
    rows = np.arange(length) >= results["topk"]
    mass = (target[layer] * chosen[layer]).sum(axis=1)[rows].mean()
    right.set(title=f"... and what {results['topk']} selected keys keep: {mass:.0%} of the mass")
    patches = [
        Rectangle((0, 0), 1, 1, color=color) for color in (COLORS["sparse"], COLORS["untrained"])
    ]
    right.legend(patches, ["selected", "missed"], loc="upper right", fontsize=10)
    for axes in (left, right):
        axes.set(xlabel="key", ylabel="query")
        axes.grid(visible=False)
    return figure


def _kept_and_missed(p: np.ndarray, chosen: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """RGB: selected keys blue, missed ones orange, as strong as their mass to the power 0.4."""
    strength = np.clip(p, 0, 1)[..., None] ** 0.4
    kept, missed = np.array(to_rgb(COLORS["sparse"])), np.array(to_rgb(COLORS["untrained"]))
    # A selected key without mass stays visible, as a pale blue.
    strength = np.where(chosen[..., None], 0.25 + 0.75 * strength, strength)
    color = np.where(chosen[..., None], kept, missed)
    picture = 1 - strength * (1 - color)
    return np.where(seen[..., None], picture, 0.95)


def cost(results: Results) -> Figure:
    """Work per token against position: counted for the published layer, measured on this one."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.4, 4.1), layout="constrained")
    published = LayerShape()
    cross = published.crossovers()
    t = np.geomspace(128, 131_072, 400)
    lines = (
        ("dense, decode (MQA mode)", published.dense_decode_flop, COLORS["dense"], "-"),
        ("dense, prefill (MHA mode)", published.dense_prefill_flop, COLORS["dense"], "--"),
        ("DSA", published.sparse_flop, COLORS["sparse"], "-"),
        ("DSA by mask, short prefill", published.masked_prefill_flop, COLORS["sparse"], ":"),
    )
    for label, count, color, style in lines:
        left.plot(t, [count(x) / 1e9 for x in t], style, color=color, label=label)
    for key in ("decode operations", "prefill operations"):
        left.plot(cross[key], published.sparse_flop(cross[key]) / 1e9, **_CROSSING)
    left.set(title="Operations, V3.2-Exp's layer (counted)", ylabel="GFLOP per token and layer")
    middle.plot(
        t, [published.dense_bytes(x) / 1e6 for x in t], color=COLORS["dense"], label="dense"
    )
    middle.plot(
        t, [published.sparse_bytes(x) / 1e6 for x in t], color=COLORS["sparse"], label="DSA"
    )
    place = cross["decode bytes"]
    middle.plot(place, published.sparse_bytes(place) / 1e6, label="crossover", **_CROSSING)
    middle.set(title="Cache bytes read in decode (counted)", ylabel="MB per token and layer")
    panels = [(left, published.topk), (middle, published.topk)]
    if results["cost"]["measured"]:
        _measured(right, results["cost"])
        panels.append((right, results["cost"]["shape"]["topk"]))
    else:
        right.set_axis_off()
    for axes, topk in panels:
        axes.set(xscale="log", yscale="log", xlabel="position t (cached keys)")
        axes.axvline(topk, color=COLORS["sparse"], linewidth=0.8, alpha=0.5)
        low, high = (round(np.log2(x)) for x in axes.dataLim.intervalx)
        ticks = [2**n for n in range(low, high + 1, 2)]
        axes.set_xticks(ticks, [size_label(x) for x in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.text(
            topk, 0.02, f" k = {topk}", transform=axes.get_xaxis_transform(), fontsize=8,
            color=COLORS["sparse"],
        )  # fmt: skip
        axes.legend(loc="upper left")
    return figure


_CROSSING: Mapping[str, Any] = {
    "marker": "o", "markersize": 8, "markerfacecolor": "none", "color": "#d55e00",
    "linestyle": "none",
}  # fmt: skip


def _measured(axes: Axes, cost_results: Mapping[str, Any]) -> None:
    points, shape = cost_results["measured"], cost_results["shape"]
    x = [point["position"] for point in points]
    dsa = [1e3 * (point["indexer"] + point["sparse"]) for point in points]
    indexer = [1e3 * point["indexer"] for point in points]
    axes.plot(x, [1e3 * p["dense"] for p in points], "o-", color=COLORS["dense"], label="dense")
    axes.plot(x, dsa, "o-", color=COLORS["sparse"], label="DSA")
    axes.plot(x, indexer, ":", color=COLORS["sparse"], label="of which the indexer")
    axes.set_title(f"Time on this machine, {shape['heads']} heads (measured)")
    axes.set_ylabel("ms per decoded token and layer")
