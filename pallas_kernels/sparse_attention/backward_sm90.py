"""The backward of sparse attention on Hopper, bit-equal between runs.

What is computed, for a window of queries after another, as many as the workspace holds:

    weights_sm90    P and dS, [window, N, K] in bf16
    dq_sm90         dQ = dS K
    rows_sm90       for every query and selected key the row dS^T Q + P^T dO, in bf16
    sum_rows_sm90   dKV: the rows of each key added up in fp32, in the order of the queries

P and dS and the sums are one kernel, `weights_and_sums_sm90`: where the keys stay in the L2, P and
dS of a window run beside the sums of the one before. The ones keep the tensor core busy, the others
wait for the memory.

Adding rows where they belong with atomics would take as long: a fp32 row costs 2.3 KB of atomic
traffic, a bf16 row 1.15 KB written and 1.15 KB read; and atomics slow down to a third once dKV is
larger than the L2, and have no order. A row in bf16 is what a matmul in bf16 would give for it; the
roundings of a key's rows are independent and so weigh less in their sum than its own final one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.tiles import LOG2E
from pallas_kernels.sparse_attention import (
    dq_sm90,
    forward_sm90,
    rows_sm90,
    weights_and_sums_sm90,
)
from pallas_kernels.sparse_attention.backward_lists import BLOCK, ascending, pairs_by_block
from pallas_kernels.tiling import vary_like

TILES = 128  # selected keys, of which the kernels take two tiles at a time
# A window costs a pass over dKV in fp32 and the ends of three kernels, so that few are better.
WORKSPACE_BYTES = 4 * 2**30
L2_BYTES = 50 * 2**20
SUMMING = 24, 66
"""How many clusters of how many add up rows beside those of P and dS."""


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
    scale, window, sms: int = 132, beside: bool | None = None, interpret=None,
):  # fmt: skip
    """The gradients of q, and of kv in f32, with at most so many queries in a window.

    `beside` says whether sums run beside P and dS; by default where that is faster.
    """
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
    blocks = -(-batch * rows // BLOCK)
    parts = max(1, -(-2 * sms // blocks)) if blocks < 2 * sms else 1
    window = _even(total, max(1, window * split), sms)
    call = _Call(
        arrays=(*(by_query(x) for x in (q, dout, out, lse, dlse)), kv.reshape(-1, width), indices),
        # The kernels write all of these: nothing has to be there before.
        dq=jax.new_ref(lax.empty((total, some, width), q.dtype)),
        sums=jax.new_ref(lax.empty((parts, blocks * BLOCK, width), jnp.float32)),
        added=jax.new_ref(lax.empty((window * selected, width), q.dtype)),
        scale=scale,
        options={"sms": sms, "interpret": interpret, "window": window},
        queries=queries * split,
        rows=rows,
        total=total,
    )
    # Rows that pass through the L2 drive keys out of it.
    beside = kv.nbytes <= L2_BYTES // 2 if beside is None else beside
    # Side by side the last step has no queries, only the sums of those of the step before.
    steps = -(-total // window) + beside
    firsts = window * jnp.arange(steps, dtype=jnp.int32)
    step = call.side_by_side if beside else call.in_turn
    if interpret is None:
        lax.scan(lambda _, first: (None, step(first)), None, firsts)
    else:  # two interpreted kernels in one program wait for each other
        for first in firsts:
            step(first)
    # The kernels do not tell over which mesh axes their results vary.
    dq, dkv = vary_like((jax.freeze(call.dq), jax.freeze(call.sums).sum(0)), (q, kv))
    dq = dq.reshape(batch, queries, -1, width)[:, :, :heads]
    return dq, dkv[: batch * rows].reshape(batch, rows, width)


def _even(total: int, limit: int, sms: int) -> int:
    """Queries of a window: as few windows as the limit allows, of one size that fills the SMs."""
    window = -(-total // -(-total // min(limit, total)))
    filling = -(-window // sms) * sms
    return filling if filling <= min(limit, total) else window


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the windows of a call have in common. Queries are those of all rows of the batch."""

    arrays: tuple[Any, ...]  # q, dO, O, lse in base 2, dlse, by query and head; keys; selections
    dq: Any  # a ref
    sums: Any  # a ref: parts of dKV
    added: Any  # a ref: rows of a window
    scale: float
    options: dict[str, Any]
    queries: int  # of a row of the batch
    rows: int  # keys of a row of the batch
    total: int  # queries

    def side_by_side(self, first) -> None:
        """P and dS of a window beside the sums of the one before, which the first does not have."""
        window = self.options["window"]
        some = max(1, self._clusters() * SUMMING[0] // SUMMING[1])
        some = jnp.where(first == 0, 0, jnp.where(first < self.total, some, self._clusters()))
        lists = self._lists(first - window)
        self._products(first, *self._weights_and_sums(first, some, first == window, lists))

    def in_turn(self, first) -> None:
        """P and dS of a window, then its sums."""
        lists = self._lists(first)
        self._products(first, *self._weights_and_sums(first, 0, 0, lists))
        self._weights_and_sums(self.total, self._clusters(), first == 0, lists)

    def _clusters(self) -> int:
        return weights_and_sums_sm90.clusters(self.arrays[0].shape[1], self.options["sms"])

    def _lists(self, first):
        """Those of a window; empty ones before the first."""
        *_, keys, indices = self.arrays
        blocks = -(-keys.shape[0] // BLOCK)
        number = first + jnp.arange(self.options["window"])
        exists = (number >= 0) & (number < self.total)
        mine = jnp.take(indices, jnp.where(exists, number, 0), axis=0)
        key = mine + (number // self.queries * self.rows)[:, None]  # in all rows of the batch
        key = jnp.where(exists[:, None] & (mine < self.rows), key, blocks * BLOCK)
        return pairs_by_block(key, blocks=blocks)

    def _weights_and_sums(self, first, summing, begins, lists):
        q, dout, out, lse, dlse, keys, indices = self.arrays
        work = jnp.stack([jnp.asarray(x, jnp.int32) for x in (first, summing, begins)])
        return weights_and_sums_sm90.weights_and_sums(
            work, q, dout, out, lse, dlse, keys, indices, self.added, lists, self.sums,
            scale=self.scale, queries=self.queries, rows=self.rows, **self.options,
        )  # fmt: skip

    def _products(self, first, weights, dscores) -> None:
        q, dout, *_, keys, indices = self.arrays
        start = first.reshape(1)
        dq_sm90.dq_of_queries(
            start, keys, indices, dscores, self.dq,
            queries=self.queries, rows=self.rows, **self.options,
        )  # fmt: skip
        rows_sm90.rows_of_queries(
            start, q, dout, weights, dscores, self.added, **self.options
        )  # fmt: skip
