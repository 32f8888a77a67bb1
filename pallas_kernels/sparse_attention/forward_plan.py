# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""What the warpgroups of the forward kernel share: static numbers, SMEM, places in the rings."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper.gather import Landing
from pallas_kernels.hopper.tiles import CHUNK

HEADS = 64  # of a CTA: one wgmma's rows
KEYS = 64  # of a tile
SLOTS = 3  # of the ring
INDEX_SLOTS = 4
SCORES, LEFT, RIGHT = range(3)
LOWEST = -1e30  # where the running maximum starts: finite, so that exp2(it - it) is 1, not NaN


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static numbers of a call."""

    queries: int  # T, of one batch row
    rows: int  # S, of one batch row
    groups: int  # of 64 heads
    half: int  # C / 2
    tail: int  # columns of the rotary part: 64, or 0
    scale: float  # of the scores, in base 2
    work: int  # pieces: a query and the head groups of a cluster
    clusters: int
    cluster: int  # CTAs of a cluster: 2 or 1
    sweep: bool  # whether every second piece of work takes its tiles from the last to the first
    interpret: bool

    @property
    def tails(self) -> int:
        """Slots for tails, which hold P in the end.

        Where kv has a tail, loading it waits for P V two tiles before; else the rest of the tile
        must do, which waits for P V three tiles before.
        """
        return 2 if self.tail else SLOTS

    @property
    def middle(self) -> int:
        """Where the two accumulators of LEFT or RIGHT meet."""
        return self.half // 2 // CHUNK * CHUNK

    def query(self, work):
        """The query of a piece of work, counted through the batch."""
        return lax.div(work, jnp.int32(self.groups // self.cluster))

    def backwards(self, work):
        """Whether this piece of work starts with its last tile.

        Queries that run at the same time are at about the same place in their ascending keys. What
        they read last is still in the L2 when the next start there.
        """
        return jnp.logical_and(self.sweep, lax.rem(lax.div(work, self.clusters), 2) == 1)

    def heads(self, work):
        """The heads that this CTA serves."""
        shared = lax.rem(work, jnp.int32(self.groups // self.cluster))
        return pl.ds((shared * self.cluster + lax.axis_index("half")) * HEADS, HEADS)

    def first_row(self, work):
        """Where the keys of the batch row begin."""
        return lax.div(self.query(work), jnp.int32(self.queries)) * self.rows


@dataclasses.dataclass(frozen=True)
class Shared:
    """SMEM and barriers."""

    left: Any  # bf16 [SLOTS, 64, C/2]
    right: Any
    tail: Any  # bf16 [2 or 3, 64, 64]
    query_last: Any  # bf16 [64, 64]: the last columns of the latent
    query_tail: Any  # bf16 [64, 64]
    picked: Any  # i32 [INDEX_SLOTS, 64]: indices of the tiles
    factors: Any  # f32 [4, 64]: of the accumulator, one row a slot; the last holds Landing's words
    query_full: Any
    query_read: Any  # SCORES has taken the queries out of the ring
    picked_full: Any
    weighed: Any  # P and the factors of the slot are there
    scored: Any  # S of the tile after the slot's is done (or there is none): P V may start
    tail_read: Any  # LEFT no longer needs P
    started: Any
    landings: list[Landing]  # of the first and the last columns of LEFT, then of RIGHT
    tail_landing: Landing


class Place(NamedTuple):
    """Where an entry is in the rings."""

    slot: Any
    tail: Any

    def next(self, plan: Plan) -> Place:
        """Where the entry after is."""
        return Place(following_slot(self.slot, SLOTS), following_slot(self.tail, plan.tails))


class Entry(NamedTuple):
    """An entry to be loaded: tile -1 are the queries of the work; work may be past the end."""

    work: Any
    tile: Any
    count: Any  # tiles of the work
    index_slot: Any  # of the tile, or of the next


def following_slot(slot, slots):
    """The slot after, of a ring of so many."""
    return jnp.where(slot == slots - 1, 0, slot + 1)


def for_each_work(plan: Plan, body, carry):
    """`carry = body(work, carry)` over this cluster's share."""
    first = lax.axis_index("cluster")
    count = lax.div(plan.work - 1 - first, jnp.int32(plan.clusters)) + 1
    return lax.fori_loop(0, count, lambda i, c: body(first + i * plan.clusters, c), carry)
