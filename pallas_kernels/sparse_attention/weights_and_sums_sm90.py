# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""P and dS of a window of queries on Hopper, and beside them what dKV needs.

The CTAs are those of `weights_sm90`, which keep the tensor core and shared memory busy. Where rows
of dKV are stored, they have a fourth warpgroup, ADDER, that adds up rows of the window before
(`hopper.add_rows`): it waits for the memory, which the others leave idle, and needs nothing else
but registers. Where rows are added up as integers, VALUES leaves a bound of each key's terms.

SMEM at 576 columns: 8 x 24,576 of ring, 2 x 2 x 8,192 of P and dS on their way out, 2,048 of
indices. Registers of a thread there: SCORES 208, VALUES 192, LOADER 24, ADDER 88; or without ADDER
208, 240, 56.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import roles
from pallas_kernels.hopper.add_rows import Adder, Listed
from pallas_kernels.hopper.column_sums import WARPS
from pallas_kernels.hopper.tiles import SWIZZLED
from pallas_kernels.sparse_attention import weights_sm90
from pallas_kernels.sparse_attention.backward_shares import share_columns
from pallas_kernels.sparse_attention.weights_sm90 import (
    HEADS,
    INDEX_SLOTS,
    KEYS,
    SLOTS,
)

_DEPTH = 18  # rows that a warp of ADDER has on their way


def _registers(adder: Adder | None) -> tuple[int, ...]:
    """Of a thread of SCORES, VALUES, LOADER and ADDER, if there is one.

    Narrower shares leave some free, but a tile then has more parts.
    """
    if adder is None:
        return 208, 240, 56
    return (208, 192, 24, 88) if adder.share == 192 else (208, 200, 32, 72)


def _roles(plan: weights_sm90.Plan, adder: Adder | None, first, *refs, **shared):
    """What the warpgroups do."""
    q, dout, out, lse, dlse, kv, indices, *others = refs
    s, start = weights_sm90.Shared(**shared), first[0]
    if adder is None:
        per_column, weights, dscores, of_keys = others
        bounds = weights_sm90.Bounds(per_column, of_keys)
    else:
        *listed, weights, dscores = others
        bounds = None

    def add():
        adder.add(lax.axis_index("cluster") * plan.cluster + lax.axis_index("half"), *listed)

    return (
        lambda: weights_sm90.scores(plan, start, lse, weights, s),
        lambda: weights_sm90.values(plan, start, dlse, dscores, bounds, s),
        lambda: weights_sm90.load(plan, start, q, dout, out, kv, indices, s),
        *([] if adder is None else [add]),
    )


def _cluster(heads: int) -> int:
    """CTAs of a cluster."""
    return 2 if heads // HEADS % 2 == 0 else 1


def adder_of(rows: int, width: int, heads: int, sms: int, interpret=None) -> Adder:
    """What adds so many rows up beside P and dS, for so many heads, padded."""
    cluster = _cluster(heads)
    return Adder(
        rows=rows,
        width=width,
        share=share_columns(width),
        ctas=_clusters(heads, sms) * cluster,
        depth=_DEPTH,
        interpret=interpret is not None,
    )


def _clusters(heads: int, sms: int) -> int:
    return max(1, sms // _cluster(heads))


def weights_and_sums(
    first, q, dout, out, lse, dlse, kv, indices, listed: Listed | None = None, per_column=None, *,
    window, queries, rows, scale, sms, interpret=None,
):  # fmt: skip
    """P and dS of a window; and sums of rows of another, or bounds of what this one's add to keys.

    Args:
        first: i32 `[1]`, the first query of the window; from `all queries` on there is none.
        q: bf16 `[all queries, N, C + R]`, N a multiple of 64.
        dout: bf16 `[all queries, N, C]`.
        out: O, as dO.
        lse: f32 `[all queries, N]`, in base 2, finite.
        dlse: f32 `[all queries, N]`.
        kv: bf16 `[batch x S, C + R]`.
        indices: i32 `[all queries, K]`, K a multiple of 64.
        listed: rows to add up beside, in the ranges of `adder_of`; None for bounds.
        per_column: f32 `[C + R]`, powers of two, with which bounds are of scaled columns.
        window: queries of a window; what lies past the last query is left as it is.
        queries: T of a batch row.
        rows: S of a batch row.
        scale: of the scores.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.

    Returns:
        P and dS, bf16 `[window, K / 64, N, 64]`; and where rows are not listed bf16 `[window,
        K / 64, N / 64, 4, 64]`, whose sums over the third and fourth axis bound, but for
        `column_sums.ROUNDINGS`, how large what the query adds to the key can be:

            sum_n |dS[n]| max_c per_column[c] |Q[n, c]| + P[n] max_c per_column[c] |dO[n, c]|
    """
    total, heads, width = q.shape
    groups, tiles = heads // HEADS, indices.shape[-1] // KEYS
    cluster, clusters = _cluster(heads), _clusters(heads, sms)
    plan = weights_sm90.Plan(
        queries=queries,
        rows=rows,
        groups=groups,
        cluster=cluster,
        width=width,
        values=dout.shape[-1],
        tiles=tiles,
        scale=scale,
        window=window,
        total=total,
        clusters=clusters,
        interpret=interpret is not None,
    )
    adder = None if listed is None else adder_of(listed.rows.shape[1], width, heads, sms, interpret)

    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)

    def barriers(count: int, **options):
        return plgpu.Barrier(num_barriers=count, **options)

    result = jax.ShapeDtypeStruct((window, tiles, heads, KEYS), jnp.bfloat16)
    of_keys = jax.ShapeDtypeStruct((window, tiles, groups, WARPS, KEYS), jnp.bfloat16)
    return roles.kernel(
        "sparse_attention_weights" + ("" if adder is None else "_and_sums"),
        functools.partial(_roles, plan, adder),
        _registers(adder),
        out_type=[result, result] if adder else [result, result, of_keys],
        scratch_types={
            "ring": tile(SLOTS, KEYS, share_columns(width)),
            "p_tile": tile(2, HEADS, KEYS),
            "ds_tile": tile(2, HEADS, KEYS),
            "picked": plgpu.SMEM((INDEX_SLOTS + 1, KEYS), jnp.int32),
            "query_full": barriers(SLOTS),
            "picked_full": barriers(INDEX_SLOTS),
            "freed": barriers(SLOTS, num_arrivals=2),
            "scored": barriers(2),
            "weighed": barriers(2),
            "weights_read": barriers(2),
            "started": barriers(1),
        },
        landing_slots=SLOTS,
        grid={"cluster": clusters},
        cluster={"half": cluster},
        interpret=interpret,
    )(first, q, dout, out, lse, dlse, kv, indices, *(listed or [per_column]))
