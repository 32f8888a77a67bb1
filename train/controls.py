"""What chooses the keys: the indexer, or a control that takes its place.

A control replaces the indexer's choice inside the very same forward pass. Only against these does
a loss under sparse attention mean anything: recency alone explains much of a text, and no indexer
can beat the oracle by choosing better. Each control is a score, whose top-k is selected.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from pallas_kernels import KeyRange, Selection, indexer_scores, select_topk
from train import metrics
from train.probe import map_query_tiles

if TYPE_CHECKING:
    from dsa_jax.mla import AttentionState
    from dsa_jax.transformer import Selector

Control = Literal["dense", "indexer", "random", "recent", "oracle", "all"]

SCORED = ("indexer", "random", "recent", "oracle")
"""The controls that `control_keys` knows, in the order of its `which`."""


class Way(NamedTuple):
    """How a forward pass gets its keys.

    Attributes:
        attention: the model's argument.
        which: index into `SCORED` of the control in the indexer's place; None: none is.
        keys: how many the control chooses; 0 without one. Static: a program for each.
    """

    attention: Literal["dense", "sparse"]
    which: np.int32 | None
    keys: int


@dataclasses.dataclass(frozen=True)
class Mode:
    """What chooses the keys, and how many.

    Attributes:
        control: `dense` (no selection), `indexer`, or a control: `random` keys, the most `recent`
            ones, the teacher's best (`oracle`), or `all` visible keys through the sparse path,
            which must equal `dense` to rounding.
        topk: keys chosen; under `dense` and `all`, k of the metrics alone.
        seed: of the random keys.
    """

    control: Control
    topk: int
    seed: int = 0

    def way(self, own: int | None, length: int) -> Way:
        """How to run a model of `own` keys on rows of `length`: one program for all controls."""
        if self.control == "dense":
            return Way("dense", None, 0)
        if self.control == "indexer" and self.topk == own:
            return Way("sparse", None, 0)  # nothing stands between the measurement and serving
        if self.control == "all":
            return Way("sparse", np.int32(SCORED.index("recent")), length)
        return Way("sparse", np.int32(SCORED.index(self.control)), self.topk)


def control_keys(
    state: AttentionState,
    which: Int[Array, ""],
    *,
    topk: int,
    seed: Int[Array, ""] | int = 0,
    tile_bytes: int = 256 * 2**20,
) -> Selection:
    """The top-k of one of the scores in `SCORED`, tiled over queries.

    Args:
        state: of a layer.
        which: index into `SCORED`; may be traced, so that one program serves all of them.
        topk: keys chosen.
        seed: of the random keys, which are drawn anew for every query of every layer.
        tile_bytes: queries are taken in tiles whose fp32 logits `[B, tile, N, S]` fit in this.
    """
    batch, queries, heads, _ = state.q.shape
    keys = state.kv.shape[1]
    if topk >= keys:  # whatever the score
        visible = state.ranges.start[..., None] + jnp.arange(keys, dtype=jnp.int32)
        return Selection(jnp.where(visible < state.ranges.end[..., None], visible, -1))
    key = jax.random.fold_in(jax.random.key(seed), state.layer)

    def tile(rows: tuple) -> Int[Array, "B t K"]:
        number, q, index_q, index_w, start, end = rows
        ranges = KeyRange(start, end)

        def indexer() -> Float32[Array, "B t S"]:
            if state.index_k is None:  # a layer that shares an earlier one's keys: never asked
                return jnp.full((batch, number.shape[1], keys), jnp.nan)
            return indexer_scores(
                index_q, state.index_k, index_w, ranges, k_scale=state.index_k_scale
            )

        def random() -> Float32[Array, "B t S"]:
            # A key a query: the draw does not depend on the tiles.
            draw = lambda t: jax.random.uniform(jax.random.fold_in(key, t), (batch, keys))  # noqa: E731
            return jax.vmap(draw, out_axes=1)(number[0])

        def recent() -> Float32[Array, "B t S"]:
            latest = jnp.arange(keys, dtype=jnp.float32)
            return jnp.broadcast_to(latest, (batch, number.shape[1], keys))

        def oracle() -> Float32[Array, "B t S"]:
            return metrics.attention_target(q, state.kv, ranges, scale=state.scale)

        scores = jax.lax.switch(which, (indexer, random, recent, oracle))
        return select_topk(scores, ranges, topk=topk).indices

    number = jnp.broadcast_to(jnp.arange(queries), (batch, queries))
    rows = (number, state.q, state.index_q, state.index_w, *state.ranges)
    size = max(1, tile_bytes // (4 * batch * heads * keys))
    return Selection(map_query_tiles(tile, rows, size))


def selector(which: Int[Array, ""], *, topk: int, seed: Int[Array, ""] | int = 0) -> Selector:
    """`control_keys` as the model's `selector=`."""
    return lambda state: control_keys(state, which, topk=topk, seed=seed)
