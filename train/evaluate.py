"""How good a model is on held-out text, under its own indexer and under every control.

`evaluate` runs one model under one `Mode`; `python -m train evaluate` compares the modes on any
checkpoint, and the demo's ladder compares checkpoints too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dsa_jax.sharding import MeshConfig, make_mesh
from train import metrics
from train.config import DataConfig
from train.controls import Control, Mode, selector
from train.data import Batch, Rows
from train.load import load_model
from train.probe import MetricSums, RowMetrics, probe
from train.sources import open_corpus

if TYPE_CHECKING:
    from dsa_jax.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Windows:
    """What the selection metrics call near, first, and a bucket of positions.

    Attributes:
        local: width of the window of latest keys.
        sink: number of first keys.
        edges: ascending numbers of visible keys; bucket i is `edges[i] < visible <= edges[i + 1]`.
    """

    local: int = 128
    sink: int = 4
    edges: tuple[int, ...] = (0, 2**11, 2**12, 2**13, 2**14, 2**15, 2**16, 2**17)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One model under one mode.

    Attributes:
        mode: what chose the keys.
        loss: `[windows]`, mean cross-entropy of each window, nats per token.
        weights: `[windows]`, tokens scored in each.
        sums: the selection metrics; None for a model without an indexer.
        token_loss: `[windows, T]`, NaN where there is no target.
    """

    mode: Mode
    loss: np.ndarray
    weights: np.ndarray
    sums: MetricSums | None
    token_loss: np.ndarray

    @property
    def cross_entropy(self) -> float:
        """Nats per token over all windows."""
        return float((self.loss * self.weights).sum() / self.weights.sum())

    def gap(self, reference: Evaluation) -> metrics.Gap:
        """How much worse this is than `reference` on the same windows."""
        return metrics.lm_gap(self.loss, reference.loss, self.weights)

    def summary(self) -> dict[str, Any]:
        """Everything as JSON-ready numbers: loss, metrics over layers, by layer and by position.

        What has no value (recall where no row has more than k keys) is None.
        """
        out: dict[str, Any] = {"cross_entropy": self.cross_entropy, "topk": self.mode.topk}
        if self.sums is not None:
            out |= self.sums.summary()
            out["layers"] = {name: self.sums.layers(name) for name in self.sums.names}
            out["edges"] = list(self.sums.edges)
            for name in ("mass_recall", "oracle_mass", "overlap"):
                out[f"{name}/buckets"] = self.sums.buckets(name)
        return _plain(out)


def _plain(value: Any) -> Any:
    """Arrays as lists, NaN as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else float(value)
    return value


def evaluate(
    model: Transformer,
    batches: Iterable[Batch],
    mode: Mode,
    windows: Windows | None = None,
    *,
    measure: bool = True,
) -> Evaluation:
    """Runs `model` over `batches` under `mode`.

    Args:
        model: its parameters are not changed.
        batches: as `held_out` yields them; every mode that is compared must see the same ones.
        mode: what chooses the keys.
        windows: of the selection metrics; the defaults suit 128K tokens.
        measure: whether to compute the selection metrics, if the model has an indexer.

    Raises:
        ValueError: the model cannot be run under this mode, or there is no batch.
    """
    _check(model, mode)
    windows = windows or Windows()
    measure = measure and model.config.has_indexer
    sums = MetricSums(mode.topk, windows.edges) if measure else None
    losses = []
    for batch in batches:
        loss, rows = _run(model, batch, mode, windows if measure else None)
        losses.append(np.where(batch["targets"] >= 0, np.asarray(loss, np.float64), np.nan))
        if sums is not None:
            sums.add(jax.device_get(rows))
    if not losses:
        raise ValueError("batches: there is nothing to evaluate on; give at least one batch")
    token_loss = np.concatenate(losses)
    weights = np.isfinite(token_loss).sum(axis=1)
    loss = np.nansum(token_loss, axis=1) / np.maximum(weights, 1)
    return Evaluation(mode, loss, weights, sums, token_loss)


def _check(model: Transformer, mode: Mode) -> None:
    config = model.config
    if mode.topk < 1:
        raise ValueError(f"mode.topk={mode.topk}: must be at least 1")
    if mode.control != "dense" and not config.has_indexer:
        raise ValueError(
            f"mode.control={mode.control!r}: this model has no indexer; evaluate it under 'dense'"
        )
    shares = len(config.indexer_layers) < config.num_hidden_layers
    if mode.control == "indexer" and shares and mode.topk != config.index_topk:
        raise ValueError(
            f"mode.topk={mode.topk}: layers of this model share the selection of earlier ones, so "
            f"its indexers can only be evaluated at index_topk={config.index_topk}"
        )


def _run(
    model: Transformer, batch: Batch, mode: Mode, windows: Windows | None
) -> tuple[jax.Array, RowMetrics | None]:
    way = mode.way(model.config.index_topk, batch["tokens"].shape[1])
    seed = np.int32(mode.seed)
    return _forward(model, batch, way.attention, mode.topk, windows, way.which, seed, keys=way.keys)


@functools.partial(jax.jit, static_argnames=("attention", "topk", "windows", "keys"))
def _forward(
    model: Transformer,
    batch: Batch,
    attention: Literal["dense", "sparse"],
    topk: int,
    windows: Windows | None,
    which: jax.Array | None,
    seed: jax.Array,
    *,
    keys: int,
) -> tuple[jax.Array, RowMetrics | None]:
    out = model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        attention=attention,
        selector=None if which is None else selector(which, topk=keys, seed=seed),
        probe=None if windows is None else probe(topk, local=windows.local, sink=windows.sink),
    )
    return metrics.token_cross_entropy(out.logits, jnp.maximum(batch["targets"], 0)), out.probe


def held_out(rows: Rows, *, count: int, batch_size: int) -> list[Batch]:
    """Evenly spaced rows of a corpus, in batches: the same ones at every call.

    Args:
        rows: the corpus in rows of T tokens.
        count: rows wanted; all of them if there are fewer. The last row of a corpus, which may be
            part padding, is taken only if it is the only one.
        batch_size: rows a batch; the last batch may be smaller.
    """
    whole = max(1, len(rows) - 1)
    chosen = np.unique(np.linspace(0, whole - 1, min(count, whole)).round().astype(int))
    taken = [rows[int(row)] for row in chosen]
    parts = [taken[i : i + batch_size] for i in range(0, len(taken), batch_size)]
    return [{name: np.stack([row[name] for row in part]) for name in part[0]} for part in parts]


# --- the command ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Held-out loss and selection metrics of a checkpoint, under its indexer and the controls."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder, one step of its checkpoints, or an exported model."""
    data: DataConfig
    """The held-out text."""
    sequence_length: int = 4096
    """Tokens a row."""
    rows: int = 16
    """Rows scored, evenly spaced over the text."""
    batch_size: int = 1
    """Rows a forward pass."""
    topk: int | None = None
    """Keys selected. None: the model's."""
    controls: tuple[Control, ...] = ("dense", "indexer", "random", "recent", "oracle")
    """What chooses the keys, each its own line of the table."""
    local: int = 128
    """Width of the window of latest keys."""
    sink: int = 4
    """Number of first keys."""
    seed: int = 0
    """Of the random keys."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matmuls."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices along each axis of the mesh."""
    output: Path | None = None
    """Also write the numbers here, as JSON."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    compare(tyro.cli(EvaluateConfig, args=arguments, prog="python -m train evaluate"), Console())
    return 0


def compare(config: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Evaluates a checkpoint under each control and prints one table.

    Returns:
        The summary of each control.

    Raises:
        FileNotFoundError: no checkpoint, or no text.
        CheckpointError: a damaged checkpoint.
        ValueError: no k for a model without an indexer, or a text without tokens.
    """
    model = load_model(config.checkpoint, mesh=config.mesh, compute_dtype=config.compute_dtype)
    topk = model.config.index_topk if config.topk is None else config.topk
    if topk is None:
        raise ValueError("topk=None: this model has no indexer and no k of its own; give one")
    controls = config.controls if model.config.has_indexer else ("dense",)
    cache = config.data.token_cache or config.checkpoint.parent / "tokens"
    corpus = open_corpus(config.data, model.config.vocab_size, cache)
    rows = Rows(corpus, config.sequence_length)
    batches = held_out(rows, count=config.rows, batch_size=config.batch_size)
    edges = bucket_edges(topk, config.sequence_length)
    windows = Windows(config.local, config.sink, edges)
    results = {}
    for control in controls:
        mode = Mode(control, topk, config.seed)
        progress = track(batches, description=f"{control:>8}", console=console, transient=True)
        with jax.set_mesh(make_mesh(config.mesh)):
            results[control] = evaluate(model, progress, mode, windows)
    console.print(table(results, title=f"{config.checkpoint} at {config.sequence_length} tokens"))
    out = {control: result.summary() for control, result in results.items()}
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")
    return out


def bucket_edges(topk: int, length: int, buckets: int = 6) -> tuple[int, ...]:
    """Edges of position buckets from k to T, evenly spaced in the logarithm."""
    if length <= topk:
        return (0, length)
    edges = np.geomspace(topk, length, buckets + 1).round().astype(int)
    return tuple(int(edge) for edge in np.unique(edges))


_COLUMNS = {
    "recall": "mass_recall",
    "worst": "mass_recall/min",
    "oracle": "oracle_mass",
    "overlap": "overlap",
    "KL": "kl",
    "entropy": "entropy_fraction",
}
"""Columns of the table and the metrics they show; `worst` is the layer of the lowest recall."""


def table(results: Mapping[str, Evaluation], title: str) -> Table:
    """The evaluations as one table, 80 columns wide; gaps are to the first of them."""
    out = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    out.add_column("keys", no_wrap=True)
    for column in ("nats/token", "gap", *_COLUMNS):
        out.add_column(column, justify="right", no_wrap=True)
    reference = next(iter(results.values()))
    for name, result in results.items():
        gap = result.gap(reference)
        summary = result.sums.summary() if result.sums is not None else {}
        cells = [summary.get(metric, math.nan) for metric in _COLUMNS.values()]
        out.add_row(
            name,
            f"{result.cross_entropy:.4f}",
            f"{gap.mean:+.4f}±{gap.stderr:.4f}",
            *("–" if math.isnan(cell) else f"{cell:.3f}" for cell in cells),
        )
    return out
