"""What the backward kernels of sparse attention share: how columns and queries are dealt out."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.tiles import CHUNK


def share_columns(width: int) -> int:
    """Columns of a share: the most chunks, up to three, that divide the width."""
    return max(c for c in (CHUNK, 2 * CHUNK, 3 * CHUNK) if width % c == 0)


def value_columns(share: int, columns: int, values: int) -> int:
    """How many columns of a share are value as well."""
    return min(max(values - share * columns, 0), columns)


def value_start(share: int, columns: int, values: int) -> int:
    """Where the copy of a share of dO starts: it has the whole width of a share."""
    return min(share * columns, values - columns)


def next_slot(slot, slots: int):
    """The slot of a ring after a slot."""
    return jnp.where(slot == slots - 1, 0, slot + 1)


def strided_loop(total, body, carry, *, mine, ctas):
    """`carry = body(i, carry)` for every i below total that falls to the CTA `mine` of so many."""
    count = lax.div(total - 1 - mine + ctas, jnp.int32(ctas))
    return lax.fori_loop(0, count, lambda i, c: body(mine + i * ctas, c), carry)


def swept(number, tile, tiles, together: int):
    """The tile that comes `tile`th in a query: every second time the tiles are taken backwards.

    Selections rise, so that queries that are computed at the same time want the same keys at about
    the same time; what they wanted last is in the L2 when the next ones begin with it.

    Args:
        number: of the query among all.
        tile: below `tiles`.
        tiles: of a query.
        together: how many queries are computed at the same time.
    """
    backwards = lax.rem(lax.div(number, jnp.int32(together)), jnp.int32(2)) == 1
    return jnp.where(backwards, tiles - 1 - tile, tile)


def drain(freed, slot, filled, slots: int):
    """Waits until what was put into a ring last has been read.

    Args:
        freed: a barrier for each slot, which its reader arrives at.
        slot: the one that would be filled next.
        filled: how many were filled in all.
        slots: of the ring.
    """

    def wait(_, slot):
        plgpu.barrier_wait(freed.at[slot])
        return next_slot(slot, slots)

    unread = jnp.minimum(filled, slots)
    lax.fori_loop(0, unread, wait, lax.rem(slot + slots - unread, jnp.int32(slots)))


@dataclasses.dataclass(frozen=True)
class SharePlan:
    """The static numbers of a call whose grid is shares of the columns and lanes of queries."""

    width: int  # C + R
    window: int  # queries of a call, at most
    total: int  # queries of all calls
    lanes: int  # CTAs of a share
    interpret: bool

    @property
    def part(self) -> int:
        """Columns of a share."""
        return share_columns(self.width)

    @property
    def shares(self) -> int:
        """How many there are."""
        return self.width // self.part

    def for_each_query(self, first, body, carry):
        """`carry = body(query of the window, carry)` over this CTA's share of the window."""
        queries = jnp.clip(self.total - first, 0, self.window)
        mine = lax.axis_index("lane")
        return strided_loop(queries, body, carry, mine=mine, ctas=self.lanes)
