"""Scores, then top-k, one window of queries after another, on Hopper.

The scores of a window fill the workspace and the top-k kernel reads them back: fp32 scores of all
pairs never exist, whatever T. Both kernels are exact and deterministic, so the selection is. Tiles
of keys that no query of a block sees are neither computed nor filled: top-k reads ranges only.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lightning_indexer import scores_operands, scores_sm90, topk_sm90
from pallas_kernels.types import KeyRange


def unsupported(q, k, topk: int) -> str | None:
    """Why the kernels cannot serve such a call; None where they can."""
    return scores_sm90.unsupported(q, k) or topk_sm90.unsupported(min(topk, k.shape[1]))


def window_queries(batch: int, queries: int, keys: int, *, block: int, workspace_bytes: int) -> int:
    """How many queries are scored at once: equal windows of whole blocks that fit the workspace."""
    fit = workspace_bytes // (4 * batch * keys)
    fit = max(fit // block, 1) * block
    if fit >= queries:
        return queries
    windows = pl.cdiv(queries, fit)
    return pl.cdiv(pl.cdiv(queries, windows), block) * block


@functools.partial(jax.jit, static_argnames=("topk", "workspace_bytes"))
def lightning_indexer(q, k, w, ranges: KeyRange, k_scale, *, topk: int, workspace_bytes: int):
    """The selected keys `[B, T, min(topk, S)]`, ascending, -1 padded.

    Args:
        q, k, w, ranges, k_scale: as in `scores_sm90.indexer_scores`.
        topk: keys to select.
        workspace_bytes: bound on the scores held at once, as long as one block of queries fits it.
    """
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    topk = min(topk, keys)
    if 0 in (batch, queries, keys):
        return jnp.full((batch, queries, topk), -1, jnp.int32)
    tiling = scores_operands.default_tiling(heads, width, q.dtype, queries)
    problem = scores_operands.Problem(
        keys, heads, queries, tiling, scores_operands.sm_count(), fill=False
    )
    window = window_queries(
        batch, queries, keys, block=problem.block, workspace_bytes=workspace_bytes
    )
    problem = dataclasses.replace(problem, queries=window)
    operands = scores_operands.operands(q, k, w, ranges, k_scale, problem)

    def select(some: scores_sm90.Window):
        scores = scores_sm90.score_window(operands, some, problem)
        bounds = (bound[:, :window].ravel() for bound in (some.start, some.end))
        rows = scores.reshape(batch * window, -1)
        return topk_sm90.select_rows(rows, *bounds, topk=topk).reshape(batch, window, topk)

    # One after another, so that they share the workspace.
    selected = lax.map(select, scores_sm90.windows(operands, problem))
    return jnp.moveaxis(selected, 0, 1).reshape(batch, -1, topk)[:, :queries]
