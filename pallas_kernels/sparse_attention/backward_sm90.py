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

import functools

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

    q, dout, out, lse, dlse = (by_query(x) for x in (q, dout, out, lse, dlse))
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, -indices.shape[2] % TILES)), constant_values=-1)
    indices = ascending(indices.reshape(batch * queries, -1), rows)
    indices = jnp.repeat(indices, split, axis=0)
    total = indices.shape[0]
    keys = kv.reshape(-1, width)
    blocks = -(-keys.shape[0] // BLOCK)
    parts = max(1, -(-2 * sms // blocks)) if blocks < 2 * sms else 1
    window = _even(total, max(1, window * split), sms)
    options = {"window": window, "queries": queries * split, "rows": rows, "sms": sms}
    # The kernels write all of these: nothing has to be there before.
    dq = jax.new_ref(lax.empty((total, some, width), q.dtype))
    sums = jax.new_ref(lax.empty((parts, blocks * BLOCK, width), jnp.float32))
    added = jax.new_ref(lax.empty((window * indices.shape[1], width), q.dtype))

    def lists_of(first):
        number = first + jnp.arange(window)
        exists = (number >= 0) & (number < total)
        mine = jnp.take(indices, jnp.where(exists, number, 0), axis=0)
        key = mine + (number // (queries * split) * rows)[:, None]  # in all rows of the batch
        key = jnp.where(exists[:, None] & (mine < rows), key, blocks * BLOCK)
        return pairs_by_block(key, blocks=blocks)

    clusters = weights_and_sums_sm90.clusters(some, sms)

    def weights_and_sums(first, summing, begins, lists):
        work = jnp.stack([jnp.asarray(x, jnp.int32) for x in (first, summing, begins)])
        return weights_and_sums_sm90.weights_and_sums(
            work, q, dout, out, lse, dlse, keys, indices, added, lists, sums,
            scale=scale, **options, interpret=interpret,
        )  # fmt: skip

    def products(first, weights, dscores):
        start = first.reshape(1)
        dq_sm90.dq_of_queries(start, keys, indices, dscores, dq, **options, interpret=interpret)
        rows_sm90.rows_of_queries(
            start, q, dout, weights, dscores, added, window=window, sms=sms, interpret=interpret
        )

    def side_by_side(_, first):
        """P and dS of a window beside the sums of the one before, which the first does not have."""
        summing = max(1, clusters * SUMMING[0] // SUMMING[1])
        summing = jnp.where(first == 0, 0, jnp.where(first < total, summing, clusters))
        lists = lists_of(first - window)
        products(first, *weights_and_sums(first, summing, first == window, lists))
        return None, None

    def in_turn(_, first):
        lists = lists_of(first)
        products(first, *weights_and_sums(first, 0, 0, lists))
        weights_and_sums(total, clusters, first == 0, lists)
        return None, None

    steps = -(-total // window)
    # Rows that pass through the L2 drive keys out of it.
    beside = keys.nbytes <= L2_BYTES // 2 if beside is None else beside
    # Side by side the last step has no queries, only the sums of those of the step before.
    firsts = window * jnp.arange(steps + 1 if beside else steps, dtype=jnp.int32)
    step = side_by_side if beside else in_turn
    if interpret is None:
        lax.scan(step, None, firsts)
    else:  # two interpreted kernels in one program wait for each other
        for first in firsts:
            step(None, first)
    # The kernels do not tell over which mesh axes their results vary.
    dq, dkv = vary_like((jax.freeze(dq), jax.freeze(sums).sum(0)), (q, kv))
    dq = dq.reshape(batch, queries, -1, width)[:, :, :heads]
    return dq, dkv[: batch * rows].reshape(batch, rows, width)


def _even(total: int, limit: int, sms: int) -> int:
    """Queries of a window: as few windows as the limit allows, of one size that fills the SMs."""
    window = -(-total // -(-total // min(limit, total)))
    filling = -(-window // sms) * sms
    return filling if filling <= min(limit, total) else window
