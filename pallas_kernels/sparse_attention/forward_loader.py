# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""What fills the ring of the forward kernel: queries, indices and gathered keys."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import gather_rows
from pallas_kernels.hopper.tiles import CHUNK
from pallas_kernels.sparse_attention.forward_plan import (
    INDEX_SLOTS,
    KEYS,
    LEFT,
    SLOTS,
    Entry,
    Place,
    Plan,
    Shared,
)


class Loader:
    """The half of LEFT and RIGHT that fills the ring, three entries ahead (the tail: two)."""

    def __init__(self, plan: Plan, side: int, q, kv, indices, tiles, s: Shared):
        self.plan, self.side, self.s = plan, side, s
        self.q, self.kv, self.indices, self.tiles = q, kv, indices, tiles
        self.ring = s.left if side == LEFT else s.right
        self.first_column = 0 if side == LEFT else plan.half
        self.landings = s.landings[:2] if side == LEFT else s.landings[2:]

    def first(self) -> Entry:
        """The queries of the first piece of work."""
        work = lax.axis_index("cluster")
        count = self.tiles[self.plan.query(work)]
        if self.side == LEFT:
            self._fetch_indices(work, 0, count, 0)
        return Entry(work, jnp.int32(-1), count, jnp.int32(0))

    def following(self, entry: Entry) -> Entry:
        """The entry after; LEFT also sends for the indices that will be needed next."""
        plan = self.plan
        loaded = jnp.where(entry.tile >= 0, 1, 0)
        index_slot = lax.rem(entry.index_slot + loaded, jnp.int32(INDEX_SLOTS))
        last = entry.tile == entry.count - 1
        work = jnp.where(last, entry.work + plan.clusters, entry.work)
        more = work < plan.work
        count = lax.cond(
            jnp.logical_and(last, more),
            lambda: self.tiles[plan.query(work)],
            lambda: entry.count,
        )
        if self.side == LEFT:

            @pl.when(jnp.logical_and(entry.tile >= 0, more))
            def _():
                self._fetch_indices(work, jnp.where(last, 0, entry.tile + 1), count, index_slot)

        return Entry(work, jnp.where(last, -1, entry.tile + 1), count, index_slot)

    def _fetch_indices(self, work, tile, count, index_slot):
        if self.plan.sweep:
            tile = jnp.where(self.plan.backwards(work), count - 1 - tile, tile)
        plgpu.copy_gmem_to_smem(
            self.indices.at[self.plan.query(work), pl.ds(tile * KEYS, KEYS)],
            self.s.picked.at[index_slot],
            self.s.picked_full.at[index_slot],
        )

    def load(self, entry: Entry, place: Place, part: int):
        """Starts a part of this side's half of an entry, three entries ahead.

        The parts of a tile are its first columns, most of the others, and the rest. Of queries
        all goes with part 1.
        """
        more = entry.work < self.plan.work
        target = self.ring.at[place.slot]
        if part == 1:

            @pl.when(jnp.logical_and(more, entry.tile < 0))
            def _():
                self._fetch_queries(entry, target, self.first_column, place.slot)

        @pl.when(jnp.logical_and(more, entry.tile >= 0))
        def _():
            if part == 0:
                plgpu.barrier_wait(self.s.picked_full.at[entry.index_slot])
            self._gather(entry, target, self.first_column, place.slot, part)

    def load_tail(self, entry: Entry, place: Place):
        """Starts the tail of an entry, two entries ahead; RIGHT does."""
        if not self.plan.tail or self.side == LEFT:
            return
        more = entry.work < self.plan.work
        target = self.s.tail.at[place.tail]
        first_column = 2 * self.plan.half

        @pl.when(jnp.logical_and(more, entry.tile < 0))
        def _():
            # The entry is one ahead of the slot's, two ahead of this one's.
            slot = lax.rem(place.slot + 2, jnp.int32(SLOTS))
            self._fetch_queries(entry, target, first_column, slot)

        @pl.when(jnp.logical_and(more, entry.tile >= 0))
        def _():
            self._gather(entry, target, first_column, place.tail, None)

    def _fetch_queries(self, entry, target, first_column, slot):
        columns = pl.ds(first_column, target.shape[-1])
        source = self.q.at[self.plan.query(entry.work), self.plan.heads(entry.work), columns]
        plgpu.copy_gmem_to_smem(source, target, self.s.query_full.at[slot])

    def _gather(self, entry, target, first_column, slot, part):
        half, s = self.plan.half, self.s
        middle, most = self.plan.middle, half - CHUNK
        columns = {None: (0, CHUNK), 0: (0, middle), 1: (middle, most), 2: (most, half)}[part]
        if columns[0] == columns[1]:
            return
        gather_rows(
            self.kv,
            s.picked.at[entry.index_slot],
            target,
            s.tail_landing if part is None else self.landings[min(part, 1)],
            slot,
            first_row=self.plan.first_row(entry.work),
            rows=self.plan.rows,
            first_column=first_column,
            columns=columns,
            arrive=part != 1,
        )
