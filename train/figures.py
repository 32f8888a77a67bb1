"""The demo's figures: one function a file, each drawn from `results.json` and the stages' logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed, and none may be there

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from train.figure_style import COLORS, FAILING, STYLE, TITLES, size_label
from train.figures_cost import cost, selection
from train.ladder import rungs

Results = Mapping[str, Any]
Curves = Sequence[Mapping[str, Sequence[Mapping[str, Any]]]]
"""Per run (seed), per stage: the training records."""


def draw_all(
    folder: Path, results: Results, curves: Curves, snapshot: Mapping[str, np.ndarray] | None
) -> dict[str, Path]:
    """Draws every figure into `folder` as PNG.

    Args:
        folder: created if need be.
        results: the demo's results.
        curves: training records.
        snapshot: arrays of `ladder.snapshot`; None: no picture of a selection.

    Returns:
        The files by name of the figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[], Figure]] = {
        "training": lambda: training(results, curves),
        "ladder": lambda: ladder(results),
        "positions": lambda: positions(results),
        "layers": lambda: layers(results),
        "sweep": lambda: sweep(results),
        "cost": lambda: cost(results),
    }
    if "needles" in results["runs"][0]:
        drawings["needles"] = lambda: needles(results)
    if snapshot is not None:
        drawings["selection"] = lambda: selection(results, snapshot)
    paths = {}
    with plt.rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw()
            paths[name] = folder / f"{name}.png"
            figure.savefig(paths[name])
            plt.close(figure)
    return paths


# --- training -------------------------------------------------------------------------------------


def training(results: Results, curves: Curves) -> Figure:
    """Loss of the dense model, KL of both indexer stages, and the two ways to go on."""
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=(1, 1.15, 1)
    )
    for run in curves:
        _curve(left, run["dense"], "lm_loss", COLORS["dense"])
        _layer_curves(middle, run["warmup"], run["sparse"])
        _curve(right, run["control"], "lm_loss", COLORS["control"], "dense control")
        _curve(right, run["sparse"], "lm_loss", COLORS["sparse"], "sparse training")
    left.set(title="Dense pre-training", xlabel="step", ylabel="training loss (nats/byte)")
    middle.set(title="KL of each layer's indexer", xlabel="step", ylabel="KL (nats)")
    middle.set_yscale("log")
    middle.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    middle.yaxis.set_minor_formatter(FuncFormatter(_one_two_five))
    right.set(
        title="From the same checkpoint on", xlabel="step", ylabel="training loss (nats/byte)"
    )
    # The first sparse steps can be far off: the scale is set by the later ones.
    later = [v for run in curves for name in ("sparse", "control")
             for v in _series(run[name], "lm_loss")[1][len(run[name]) // 20 :]]  # fmt: skip
    if later:
        right.set_ylim(min(later) - 0.05, max(later) + 0.25 * (max(later) - min(later)))
    _legend_once(right)
    _legend_once(middle)
    return figure


def _one_two_five(value: float, _: Any) -> str:
    """Labels of a logarithmic axis between the powers of ten: 2 and 5 only."""
    leading = round(value / 10 ** np.floor(np.log10(value)))
    return f"{value:g}" if leading in (2, 5) else ""


def _curve(
    axes: Axes, records: Sequence[Mapping[str, Any]], key: str, color: Any, label: str = ""
) -> None:
    steps, values = _series(records, key)
    if not len(steps):
        return
    axes.plot(steps, values, color=color, alpha=0.18, linewidth=0.8)
    axes.plot(steps, _smooth(values), color=color, linewidth=1.8, label=label or None)


def _layer_curves(
    axes: Axes, warmup: Sequence[Mapping[str, Any]], sparse: Sequence[Mapping[str, Any]]
) -> None:
    """KL per layer: warm-up over all visible keys, then sparse over the selected ones."""
    steps, warm = _series(warmup, "kl_layers")
    after, chosen = _series(sparse, "kl_layers")
    if not len(steps):
        return
    shift = steps[-1]
    for layer, color in enumerate(_layer_colors(warm.shape[1])):
        label = f"layer {layer}"
        axes.plot(steps, _smooth(warm[:, layer], 9), color=color, linewidth=1.6, label=label)
        if len(after):
            smooth = _smooth(chosen[:, layer], 9)
            axes.plot(after + shift, smooth, color=color, linewidth=1.6, linestyle=(0, (2, 1)))
    axes.axvline(shift, color="#777777", linewidth=0.8)
    top = axes.get_xaxis_transform()
    axes.text(shift, 1.0, " sparse: selected keys", transform=top, va="top", fontsize=8)
    axes.text(shift, 1.0, "warm-up: all keys ", transform=top, va="top", ha="right", fontsize=8)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    found = [record for record in records if key in record]
    return (
        np.array([record["step"] for record in found]),
        np.array([record[key] for record in found], np.float64),
    )


def _smooth(values: np.ndarray, width: int = 25) -> np.ndarray:
    """Running mean over at most `width` records, narrower at both ends."""
    half = min(width, max(1, len(values) // 5)) // 2
    total = np.cumsum(np.pad(values, (1, 0)))
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _layer_colors(count: int) -> list[Any]:
    return [plt.get_cmap("viridis")(x) for x in np.linspace(0.05, 0.8, count)]


def _legend_once(axes: Axes, **options: Any) -> None:
    """A legend with each label once: several runs draw the same line."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(list(unique.values()), list(unique), **options)


# --- the ladder -----------------------------------------------------------------------------------


def ladder(results: Results) -> Figure:
    """Held-out loss of every rung, and how far each is from dense attention."""
    runs = results["runs"]
    names = list(runs[0]["ladder"])
    rows = np.arange(len(names))[::-1]
    loss = np.array([[run["ladder"][name]["cross_entropy"] for name in names] for run in runs])
    gap = loss - loss[:, [names.index("dense")]]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 0.36 * len(names) + 1.4), layout="constrained", sharey=True
    )
    near = gap[:, [name not in FAILING for name in names]]  # the others run off the right panel
    low, limit = min(near.min(), 0.0), 1.35 * max(near.max(), 0.02)
    _bars(left, rows, loss, names, "{:.3f}", loss.max() * 1.2)
    _bars(right, rows, gap, names, "{:+.3f}", limit)
    right.axvline(0, color=COLORS["dense"], linewidth=1)
    right.set_xlim(1.1 * low - 0.02 * limit, limit)
    left.set_yticks(rows, [TITLES[name] for name in names])
    k, length = results["topk"], results["length"]
    left.set(title=f"Held-out loss, k = {k} of up to {length} keys", xlabel="nats/byte")
    right.set(title="Difference to dense attention", xlabel="nats/byte")
    return figure


def _bars(
    axes: Axes, rows: np.ndarray, values: np.ndarray, names: Sequence[str], form: str, limit: float
) -> None:
    """Horizontal bars of the mean over runs `[runs, rungs]`, whiskers for the range."""
    mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
    axes.barh(rows, mean, color=[COLORS[name] for name in names], height=0.72)
    axes.set_xlim(0, limit)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    if len(values) > 1:
        spread = np.stack([mean - low, high - mean])
        axes.errorbar(mean, rows, xerr=spread, fmt="none", ecolor="#222222", capsize=2.5)
    for row, value, end in zip(rows, mean, high, strict=True):
        text = " " + form.format(value)
        if end < 0.87 * limit:
            axes.text(max(end, 0), row, text, va="center", fontsize=9)
        else:
            mark, place = (" ▸ ", limit) if end > limit else (" ", end)
            axes.text(place, row, text + mark, va="center", ha="right", fontsize=9, color="white")


def needles(results: Results) -> Figure:
    """The share of needles answered, by length of the document and depth in it."""
    runs = results["runs"]
    asked = runs[0]["needles"]
    shown = rungs(list(asked["accuracy"]))
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(13, 0.6 + 2.4 * rows), layout="constrained", sharex=True,
        sharey=True, squeeze=False,
    )  # fmt: skip
    for unused in panels.flat[len(shown) :]:
        unused.set_axis_off()
    trained = sum(length <= results["length"] for length in asked["lengths"])
    images = []
    for axes, rung in zip(panels.flat, shown, strict=False):
        share = np.mean([run["needles"]["accuracy"][rung.name] for run in runs], axis=0)
        images.append(axes.imshow(share.T, vmin=0, vmax=1, cmap="viridis", aspect="auto"))
        for (row, column), value in np.ndenumerate(share):
            color = "white" if value < 0.6 else "black"
            axes.text(
                row, column, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8
            )
        if trained < len(asked["lengths"]):
            axes.axvline(trained - 0.5, color="#888888", linewidth=2)
        axes.set_title(rung.title)
        axes.set_xticks(range(len(asked["lengths"])), [size_label(n) for n in asked["lengths"]])
        axes.set_yticks(range(len(asked["depths"])), [f"{depth:.0%}" for depth in asked["depths"]])
        axes.grid(visible=False)
    figure.supxlabel("bytes of the document", fontsize=10)
    figure.supylabel("depth of the needle", fontsize=10)
    figure.colorbar(images[-1], ax=panels, label="answered", shrink=0.9)
    return figure


# --- by position, by layer, by k ------------------------------------------------------------------


def positions(results: Results) -> Figure:
    """Mass recall against position, for rows of the training length and for longer ones."""
    rungs = ("untrained", "recent", "warmed", "sparse")
    count = len(results["runs"][0]["ladder"]["dense"]["layers"]["kl"])
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.8 * rows), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for unused in panels.flat[count:]:
        unused.set_axis_off()
    for layer, axes in enumerate(panels.flat[:count]):
        for rung in rungs:
            _by_position(axes, results, "mass_recall", rung, layer, COLORS[rung], TITLES[rung])
        _by_position(axes, results, "oracle_mass", "sparse", layer, COLORS["oracle"], "oracle")
        axes.axvline(results["length"], color="#777777", linewidth=0.8, linestyle=":")
        axes.text(
            results["length"], 0.02, " beyond training", transform=axes.get_xaxis_transform(),
            fontsize=8,
        )  # fmt: skip
        axes.set(title=f"Layer {layer}", xlabel="visible keys", ylim=(0, 1.02))
    for row in panels:
        row[0].set_ylabel(f"attention mass in {results['topk']} keys")
    _legend_once(panels[0, -1], loc="lower left", bbox_to_anchor=(1.0, 0.2))
    return figure


def _by_position(
    axes: Axes, results: Results, metric: str, rung: str, layer: int, color: str, label: str
) -> None:
    values = []
    edges = np.array(results["runs"][0]["long_ladder"][rung]["edges"])
    for run in results["runs"]:
        values.append(run["long_ladder"][rung][f"{metric}/buckets"][layer])
    mean = np.array(values, np.float64).mean(axis=0)
    middle = (edges[:-1] + edges[1:]) / 2
    dashed = (0, (4, 2)) if metric == "oracle_mass" else "-"
    axes.plot(middle, mean, "o", linestyle=dashed, color=color, label=label, markersize=4)


def layers(results: Results) -> Figure:
    """Recall, overlap, entropy and recency of the indexer, layer by layer."""
    panels = (
        ("mass_recall", "Mass recall", "oracle_mass"),
        ("overlap", "Overlap with the oracle's keys", None),
        ("entropy_fraction", "Entropy of softmax(I) ÷ log t", None),
        ("selected_local", "Share of recent keys", "oracle_local"),
    )
    rungs = ("untrained", "warmed", "sparse")
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.6), layout="constrained")
    for panel, (metric, title, ceiling) in zip(axes, panels, strict=True):
        count = len(results["runs"][0]["ladder"]["dense"]["layers"][metric])
        for shift, rung in enumerate(rungs):
            values = _layer_values(results, rung, metric)
            place = np.arange(count) + (shift - 1) * 0.26
            panel.bar(place, values.mean(axis=0), 0.24, color=COLORS[rung], label=TITLES[rung])
            if len(values) > 1:
                for run in values:
                    panel.plot(place, run, ".", color="#222222", markersize=3)
            if ceiling is not None:
                marks = _layer_values(results, rung, ceiling).mean(axis=0)
                panel.hlines(
                    marks, place - 0.12, place + 0.12, color=COLORS["oracle"], linewidth=2.2,
                    label="oracle, same states",
                )  # fmt: skip
        panel.set(title=title, ylim=(0, 1.05))
        if count > 3:
            panel.set_xticks(range(count))
            panel.set_xlabel("layer")
        else:
            panel.set_xticks(range(count), [f"layer {layer}" for layer in range(count)])
        panel.grid(axis="x", visible=False)
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique))
    return figure


def _layer_values(results: Results, rung: str, metric: str) -> np.ndarray:
    """`[runs, layers]`."""
    return np.array([run["ladder"][rung]["layers"][metric] for run in results["runs"]], np.float64)


def sweep(results: Results) -> Figure:
    """Held-out loss against k, chosen at evaluation only."""
    figure, axes = plt.subplots(figsize=(6.2, 4), layout="constrained")
    runs = results["runs"]
    ks = sorted({int(k) for k in runs[0]["sweep"]})
    for rung in next(iter(runs[0]["sweep"].values())):
        values = np.array([[run["sweep"][str(k)][rung] for k in ks] for run in runs])
        axes.plot(ks, values.mean(axis=0), "o-", color=COLORS[rung], label=TITLES[rung])
        if len(runs) > 1:
            axes.fill_between(
                ks, values.min(axis=0), values.max(axis=0), color=COLORS[rung], alpha=0.2
            )
    for rung in ("dense", "control"):
        mean = np.mean([run["ladder"][rung]["cross_entropy"] for run in runs])
        axes.axhline(mean, color=COLORS[rung], linestyle="--", linewidth=1.2, label=TITLES[rung])
    axes.axvline(results["topk"], color="#777777", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    title = f"Loss against k at evaluation (trained with k = {results['topk']})"
    axes.set(title=title, xlabel="selected keys k", ylabel="nats/byte")
    axes.legend()
    return figure
