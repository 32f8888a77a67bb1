"""The ladder: the same held-out tokens under every pair of weights and control that explains DSA.

Each rung changes one thing. From dense attention to the oracle is what keeping k keys costs; from
the oracle to the warmed-up indexer is what the indexer gets wrong; from there to the sparse-trained
model is what adapting the weights wins back; and the dense control, trained on the same extra
tokens, is what that has to be compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from train import corpus, metrics
from train.controls import Control
from train.data import Batch
from train.evaluate import Evaluation

if TYPE_CHECKING:
    from dsa_jax.mla import AttentionState
    from dsa_jax.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Rung:
    """One line of the ladder.

    Attributes:
        name: key in the results.
        title: for people.
        weights: which model.
        control: what chooses its keys.
    """

    name: str
    title: str
    weights: str
    control: Control


DENSE, GRAFTED, WARMED, SPARSE, CONTROL = "dense", "grafted", "warmed", "sparse", "control"
"""The checkpoints: pre-trained, with a fresh indexer, and after each of the later stages."""

LADDER = (
    Rung("dense", "dense attention", GRAFTED, "dense"),
    Rung("untrained", "untrained indexer", GRAFTED, "indexer"),
    Rung("random", "random k", GRAFTED, "random"),
    Rung("recent", "most recent k", GRAFTED, "recent"),
    Rung("oracle", "oracle k", GRAFTED, "oracle"),
    Rung("warmed", "warmed-up indexer", WARMED, "indexer"),
    Rung("warmed_all", "warmed-up, k ≥ T", WARMED, "all"),
    Rung("sparse", "sparse-trained", SPARSE, "indexer"),
    Rung("sparse_oracle", "sparse, oracle k", SPARSE, "oracle"),
    Rung("sparse_all", "sparse, k ≥ T", SPARSE, "all"),
    Rung("control", "dense control", CONTROL, "dense"),
)

LONG = ("dense", "untrained", "recent", "oracle", "warmed", "sparse", "control")
"""Rungs that are also evaluated on longer rows."""

ASKED = ("dense", "untrained", "random", "recent", "oracle", "warmed", "sparse", "control")
"""Rungs that are also asked for needles."""

SWEEP = ("recent", "oracle", "warmed", "sparse")
"""Rungs that are also evaluated at other k."""


def rungs(names: Sequence[str]) -> list[Rung]:
    """The rungs of these names, in the order of the ladder."""
    return [rung for rung in LADDER if rung.name in names]


def summarise(
    ladder: Mapping[str, Evaluation], batches: Sequence[Batch]
) -> dict[str, dict[str, Any]]:
    """The ladder as plain numbers, with each rung's gaps to the dense model and to the control.

    Args:
        ladder: evaluations by name of the rung, all on the same batches.
        batches: the batches, to tell `quoted_loss` (bytes that can be looked up, see
            `corpus.quoted`) from `text_loss` (the rest).
    """
    quoted = np.concatenate([corpus.quoted(batch["tokens"]) for batch in batches])
    out = {}
    for name, evaluation in ladder.items():
        summary = evaluation.summary()
        for reference in ("dense", "control"):
            if reference in ladder:
                summary[f"gap_to_{reference}"] = list(evaluation.gap(ladder[reference]))
        for kind, chosen in (("quoted_loss", quoted), ("text_loss", ~quoted)):
            summary[kind] = float(np.nanmean(np.where(chosen, evaluation.token_loss, np.nan)))
        out[name] = summary
    return out


def largest_difference(a: Evaluation, b: Evaluation) -> float:
    """The largest difference of any token's loss between two evaluations, nats."""
    return float(np.nanmax(np.abs(a.token_loss - b.token_loss)))


def differing_rows(a: Evaluation, b: Evaluation, tolerance: float = 1e-4) -> float:
    """The share of rows in which some token's loss differs by more than `tolerance` nats."""
    return float((np.abs(a.token_loss - b.token_loss) > tolerance).any(axis=1).mean())


def snapshot(model: Transformer, batch: Batch) -> dict[str, np.ndarray]:
    """What the first row's teacher attends to and what the indexer and the oracle keep of it.

    For pictures of short rows: these are `[T, S]` arrays of every layer.

    Returns:
        `target` `[layers, T, S]`, `chosen` and `oracle` `[layers, T, S]` booleans, `tokens` `[T]`.
    """

    row = {name: jnp.asarray(values[:1]) for name, values in batch.items()}
    target, chosen, oracle = (np.asarray(x)[:, 0] for x in _look(model, row))
    return {
        "target": target,
        "chosen": chosen,
        "oracle": oracle,
        "tokens": np.asarray(row["tokens"][0]),
    }


@jax.jit
def _look(model: Transformer, row: Batch) -> Any:
    topk = model.config.index_topk
    assert topk is not None

    def look(state: AttentionState) -> tuple[jax.Array, jax.Array, jax.Array]:
        p = metrics.attention_target(state.q, state.kv, state.ranges, scale=state.scale)
        keys = p.shape[-1]
        assert state.selection is not None
        oracle = metrics.oracle_selection(p, state.ranges, topk)
        return p, state.selection.mask(keys), oracle.mask(keys)

    return model(
        row["tokens"],
        positions=row["positions"],
        segment_ids=row["segment_ids"],
        attention="sparse",
        probe=look,
    ).probe
