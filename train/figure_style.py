"""What all figures of the demo share: colours, titles, style."""

from __future__ import annotations

from typing import Any

from train.ladder import LADDER

# One colour a rung, in every figure (Okabe and Ito's palette: told apart by colour-blind readers).
COLORS = {
    "dense": "#3a3a3a",
    "control": "#8c8c8c",
    "untrained": "#d55e00",
    "random": "#e8a27c",
    "recent": "#cc79a7",
    "oracle": "#009e73",
    "warmed": "#e69f00",
    "warmed_all": "#f3d08a",
    "sparse": "#0072b2",
    "sparse_oracle": "#66b79c",
    "sparse_all": "#86bfe0",
}
FAILING = ("untrained", "random", "recent")
"""Rungs whose loss may be far off."""
TITLES = {rung.name: rung.title for rung in LADDER}
STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def size_label(tokens: int) -> str:
    """`8K` for 8192."""
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)
