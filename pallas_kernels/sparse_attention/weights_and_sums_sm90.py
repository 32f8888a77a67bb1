# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""P and dS of a window of queries on Hopper, and beside them sums of rows of the window before.

The CTAs are those of `weights_sm90`, which keep the tensor core and shared memory busy, with a
fourth warpgroup, ADDER, that adds rows up (`hopper.add_rows`): it waits for the memory, which the
others leave idle, and needs nothing else but registers.

SMEM at 576 columns: 8 x 24,576 of ring, 2 x 2 x 8,192 of P and dS on their way out, 2,048 of
indices. Registers of a thread there: SCORES 208, VALUES 192, LOADER 24, ADDER 88.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import roles
from pallas_kernels.hopper.add_rows import Adder
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


def _registers(adder: Adder) -> tuple[int, ...]:
    """Of a thread of SCORES, VALUES, LOADER and ADDER.

    Narrower shares leave some free, but a tile then has more parts.
    """
    return (208, 192, 24, 88) if adder.share == 192 else (208, 200, 32, 72)


def _roles(plan: weights_sm90.Plan, adder: Adder, first, *refs, **shared):
    """What the warpgroups do."""
    (q, dout, out, lse, dlse, kv, indices), listed = refs[:7], refs[7:12]
    weights, dscores = refs[12:]
    s, start = weights_sm90.Shared(**shared), first[0]

    def add():
        adder.add(lax.axis_index("cluster") * plan.cluster + lax.axis_index("half"), *listed)

    return (
        lambda: weights_sm90.scores(plan, start, lse, weights, s),
        lambda: weights_sm90.values(plan, start, dlse, dscores, s),
        lambda: weights_sm90.load(plan, start, q, dout, out, kv, indices, s),
        add,
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
    first, q, dout, out, lse, dlse, kv, indices, added, pairs, keys, bounds, sums, *,
    window, queries, rows, scale, sms, interpret=None,
):  # fmt: skip
    """P and dS of a window, bf16 `[window, K / 64, N, 64]`; and sums of rows.

    Args:
        first: i32 `[1]`, the first query of the window; from `all queries` on there is none.
        q: bf16 `[all queries, N, C + R]`, N a multiple of 64.
        dout: bf16 `[all queries, N, C]`.
        out: O, as dO.
        lse: f32 `[all queries, N]`, in base 2, finite.
        dlse: f32 `[all queries, N]`.
        kv: bf16 `[batch x S, C + R]`.
        indices: i32 `[all queries, K]`, K a multiple of 64.
        added: a `jax.Ref`, bf16 `[shares, window x K, columns]`, the rows.
        pairs: i32 `[window x K]`, rows by key.
        keys: i32 `[window x K]`, their keys.
        bounds: i32, the ranges of `adder_of`.
        sums: a `jax.Ref`, f32 `[batch x S, C + R]`, to which listed rows are added.
        window: queries of a window; what lies past the last query is left as it is.
        queries: T of a batch row.
        rows: S of a batch row.
        scale: of the scores.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.
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
    adder = adder_of(added.shape[1], width, heads, sms, interpret)

    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)

    def barriers(count: int, **options):
        return plgpu.Barrier(num_barriers=count, **options)

    result = jax.ShapeDtypeStruct((window, tiles, heads, KEYS), jnp.bfloat16)
    return roles.kernel(
        "sparse_attention_weights_and_sums",
        functools.partial(_roles, plan, adder),
        _registers(adder),
        out_type=[result, result],
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
    )(first, q, dout, out, lse, dlse, kv, indices, added, pairs, keys, bounds, sums)
