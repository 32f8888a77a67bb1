"""The backward of sparse attention on Hopper, bit-equal between runs.

What is computed, for a window of queries after another, as many as the workspace holds:

    weights_sm90    P and dS, [window, N, K] in bf16
    dq_sm90         dQ = dS K
    rows_sm90       for every query and selected key the row dS^T Q + P^T dO, in bf16
    add_rows        dKV: the rows of each key added up in fp32, in the order of the queries

The sums are no kernel of their own: a warpgroup in the CTAs of dQ adds up the first part of a
window's rows, and one in the CTAs of P and dS of the next window the rest. The products keep the
tensor core busy, the sums wait for the memory.

Adding rows where they belong with atomics would take as long: a fp32 row costs 2.3 KB of atomic
traffic, a bf16 row 1.15 KB written and 1.15 KB read; and atomics slow down to a third once dKV is
larger than the L2, and have no order. A row in bf16 is what a matmul in bf16 would give for it; the
roundings of a key's rows are independent and so weigh less in their sum than its own final one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.add_rows import bounds_of_ranges
from pallas_kernels.hopper.tiles import LOG2E
from pallas_kernels.sparse_attention import (
    dq_sm90,
    forward_sm90,
    rows_sm90,
    sums_sm90,
    weights_and_sums_sm90,
)
from pallas_kernels.sparse_attention.backward_lists import ascending, pairs_by_key
from pallas_kernels.sparse_attention.backward_shares import share_columns
from pallas_kernels.tiling import vary_like

TILES = 128  # selected keys, of which the kernels take two tiles at a time
# A window costs a pass over dKV in fp32 and the ends of three kernels, so that few are better.
WORKSPACE_BYTES = 4 * 2**30
L2_BYTES = 50 * 2**20


def unsupported(q, kv, *, value_width: int) -> str | None:
    """Why this kernel cannot serve such a call; None where it can."""
    return forward_sm90.unsupported(q, kv, value_width=value_width)


@functools.partial(jax.jit, static_argnames=("scale", "workspace_bytes", "dkv_dtype"))
def backward(
    q, kv, indices, out, lse, dout, dlse, *, scale: float, workspace_bytes: int = 0, dkv_dtype=None
):
    """Gradients of q and kv, in their dtypes or that of kv in another; it is added up in fp32."""
    _, _, heads, width = q.shape
    # P, dS and the rows in bf16, two lists in i32. Heads are padded, and split above 128.
    selected, padded = -(-indices.shape[2] // TILES) * TILES, -(-heads // 64) * 64
    per_query = selected * (2 * 2 * padded + (2 * width + 8) * -(-heads // 128))
    window = max(workspace_bytes, WORKSPACE_BYTES) // per_query
    dq, dkv = gradients(q, kv, indices, out, lse, dout, dlse, scale=scale, window=window)
    return dq, dkv.astype(dkv_dtype or kv.dtype)


def gradients(
    q, kv, indices, out, lse, dout, dlse, *,
    scale, window, sms: int = 132, cuts: Any = None, interpret=None,
):  # fmt: skip
    """The gradients of q, and of kv in f32, with at most so many queries in a window.

    `cuts` are where the rows of a window are divided; by default so that it takes least time.
    """
    cuts = _cuts(kv.nbytes) if cuts is None else cuts
    batch, queries, heads, width = q.shape
    rows = kv.shape[1]
    finite = jnp.isfinite(lse)  # a query without keys gives no gradient, and takes none
    lse, dlse = jnp.where(finite, lse * LOG2E, 0.0), jnp.where(finite, dlse, 0.0)

    # More than 128 heads are as many queries with the same keys.
    split = -(-heads // 128)
    some = -(-heads // split // 64) * 64

    def by_query(x):
        x = jnp.pad(x, [(0, 0), (0, 0), (0, some * split - heads)] + [(0, 0)] * (x.ndim - 3))
        return x.reshape(batch * queries * split, some, *x.shape[3:])

    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, -indices.shape[2] % TILES)), constant_values=-1)
    indices = ascending(indices.reshape(batch * queries, -1), rows)
    indices = jnp.repeat(indices, split, axis=0)
    total, selected = indices.shape
    window, part = _even(total, max(1, window * split), sms), share_columns(width)
    call = _Call(
        arrays=(*(by_query(x) for x in (q, dout, out, lse, dlse)), kv.reshape(-1, width), indices),
        # The kernels write these two: nothing has to be there before.
        dq=jax.new_ref(lax.empty((total, some, width), q.dtype)),
        added=jax.new_ref(lax.empty((width // part, window * selected, part), q.dtype)),
        sums=jax.new_ref(jnp.zeros((batch * rows, width), jnp.float32)),
        scale=scale,
        cuts=cuts,
        options={"sms": sms, "interpret": interpret, "window": window},
        queries=queries * split,
        rows=rows,
        total=total,
    )
    firsts = window * jnp.arange(-(-total // window), dtype=jnp.int32)
    lists = vary_like(call.no_lists(), (q, kv, indices))
    if interpret is None:
        lists, _ = lax.scan(lambda lists, first: (call.step(first, lists), None), lists, firsts)
    else:  # two interpreted kernels in one program wait for each other
        for first in firsts:
            lists = call.step(first, lists)
    call.finish(lists)
    # The kernels do not tell over which mesh axes their results vary.
    dq, dkv = vary_like((jax.freeze(call.dq), jax.freeze(call.sums)), (q, kv))
    dq = dq.reshape(batch, queries, -1, width)[:, :, :heads]
    return dq, dkv.reshape(batch, rows, width)


def _even(total: int, limit: int, sms: int) -> int:
    """Queries of a window: as few windows as the limit allows, of one size that fills the SMs."""
    window = -(-total // -(-total // min(limit, total)))
    filling = -(-window // sms) * sms
    return filling if filling <= min(limit, total) else window


def _cuts(key_bytes: int) -> tuple[float, float]:
    """Up to where rows are added up beside dQ, and from where on beside P and dS; else alone.

    Rows that pass through the L2 drive keys out of it, above all those of dQ, whose shares of
    columns are gathered at different times; and beside P and dS sums are quick only as long as
    there are few. So this is measured.
    """
    if key_bytes <= L2_BYTES // 2:
        return 0.2, 0.6
    return (0.0, 0.65) if key_bytes <= L2_BYTES else (0.0, 1.0)


class _Lists(NamedTuple):
    """The rows of a window by key: what `hopper.add_rows` goes by."""

    pairs: Any
    keys: Any
    beside_dq: Any  # bounds of ranges of what is added up beside dQ
    alone: Any  # the same of what is added up with nothing beside
    beside_weights: Any  # and beside P and dS of the next window, if there is one
    at_the_end: Any  # and else


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the windows of a call have in common. Queries are those of all rows of the batch."""

    arrays: tuple[Any, ...]  # q, dO, O, lse in base 2, dlse, by query and head; keys; selections
    dq: Any  # a ref
    added: Any  # a ref: rows of a window
    sums: Any  # a ref: dKV
    scale: float
    cuts: Any  # of the lists
    options: dict[str, Any]
    queries: int  # of a row of the batch
    rows: int  # keys of a row of the batch
    total: int  # queries

    def step(self, first, before: _Lists) -> _Lists:
        """The kernels of a window, and what is left to add up of the one before.

        Returns what is left to add up of this one.
        """
        q, dout, out, lse, dlse, kv, indices = self.arrays
        start, places = first.reshape(1), {"queries": self.queries, "rows": self.rows}
        weights, dscores = weights_and_sums_sm90.weights_and_sums(
            start, q, dout, out, lse, dlse, kv, indices,
            self.added, before.pairs, before.keys, before.beside_weights, self.sums,
            scale=self.scale, **places, **self.options,
        )  # fmt: skip
        rows_sm90.rows_of_queries(start, q, dout, weights, dscores, self.added, **self.options)
        lists = self._lists(first)
        self._sum(lists, lists.alone)
        dq_sm90.dq_of_queries(
            start, kv, indices, dscores,
            self.added, lists.pairs, lists.keys, lists.beside_dq, self.sums, self.dq,
            **places, **self.options,
        )  # fmt: skip
        return lists

    def finish(self, lists: _Lists) -> None:
        """What is left to add up of the last window."""
        self._sum(lists, lists.at_the_end)

    def _sum(self, lists: _Lists, bounds) -> None:
        options = {name: self.options[name] for name in ("sms", "interpret")}
        sums_sm90.sum_rows(self.added, lists.pairs, lists.keys, bounds, self.sums, **options)

    def no_lists(self) -> _Lists:
        """Those before the first window."""
        nothing = jnp.zeros(self.added.shape[1], jnp.int32)
        return _Lists(nothing, nothing, *(jnp.zeros(n + 1, jnp.int32) for n in self._ranges()))

    def _lists(self, first) -> _Lists:
        """Those of a window."""
        *_, indices = self.arrays
        batch_rows = self.sums.shape[0]
        number = first + jnp.arange(self.options["window"], dtype=jnp.int32)
        mine = jnp.take(indices, jnp.minimum(number, self.total - 1), axis=0)
        key = mine + (number // self.queries * self.rows)[:, None]  # in all rows of the batch
        exists = (number < self.total)[:, None] & (mine < self.rows)
        pairs, keys = pairs_by_key(jnp.where(exists, key, batch_rows), largest=batch_rows)
        count = jnp.sum(exists, dtype=jnp.int32)
        first_cut, second_cut = (
            (count.astype(jnp.float32) * part).astype(jnp.int32) for part in self.cuts
        )
        limits = (0, first_cut), (first_cut, second_cut), (second_cut, count), (second_cut, count)
        parts = [(*both, n) for both, n in zip(limits, self._ranges(), strict=True)]
        return _Lists(pairs, keys, *bounds_of_ranges(keys, parts))

    def _ranges(self) -> tuple[int, int, int, int]:
        """Of the lists, in the order of `_Lists`."""
        _, heads, width = self.arrays[0].shape
        some = self.added.shape[1], width
        options = {name: self.options[name] for name in ("sms", "interpret")}
        alone = sums_sm90.adder_of(*some, **options).ranges
        return (
            dq_sm90.adder_of(*some, **options).ranges,
            alone,
            weights_and_sums_sm90.adder_of(*some, heads, **options).ranges,
            alone,
        )
