# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""First and third part of sparse attention's backward on Hopper, of two windows of queries.

Two kinds of CTA side by side: those of `weights_sm90` compute P and dS of a window and keep the
tensor core busy; those of `sum_rows_sm90` add up what the window before gives dKV and wait for the
memory. How many are of which kind is for the caller to say, none of one kind included.

SMEM at 576 columns: 8 x 24,576 of ring, 2 x 2 x 8,192 of P and dS on their way out, 2,048 of
indices. Registers of a thread: 232 where it multiplies, 40 where it loads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import Landing
from pallas_kernels.hopper.tiles import SWIZZLED
from pallas_kernels.sparse_attention import sum_rows_sm90, weights_sm90
from pallas_kernels.sparse_attention.backward_lists import BLOCK
from pallas_kernels.sparse_attention.backward_shares import share_columns

KEYS = 64  # of a tile
HEADS = 64  # of a CTA
SLOTS, INDEX_SLOTS = weights_sm90.SLOTS, weights_sm90.INDEX_SLOTS
LOADER = 2


def _run_weights(plan, role, first, inputs, outputs, shared):
    q, dout, out, lse, dlse, kv, indices = inputs
    weights, dscores = outputs
    s = weights_sm90.Shared(**shared)
    if role == weights_sm90.SCORES:
        weights_sm90.scores(plan, first, lse, weights, s)
    elif role == weights_sm90.VALUES:
        weights_sm90.values(plan, first, dlse, dscores, s)
    else:
        weights_sm90.load(plan, first, q, dout, out, kv, indices, s)


def _run_sums(plan, role, fresh, rows, lists, sums, shared):
    first_tile, tile_count, pairs, keys = lists
    s = sum_rows_sm90.Shared(**shared)
    if role == LOADER:
        sum_rows_sm90.load(plan, first_tile, tile_count, rows, pairs, keys, s)
    else:
        sum_rows_sm90.add(plan, role, first_tile, tile_count, fresh, sums, s)


def _kernel(work, *refs, plans, clusters: int, own, listed, landed=None, **shared):
    inputs, rows, lists, sums, outputs = refs[:7], refs[7], refs[8:12], refs[12], refs[13:]
    make_weights_plan, make_sums_plan = plans
    start, role = work[0], lax.axis_index("role")
    weights_plan = make_weights_plan(0, 0)
    summing, fresh = work[1], work[2] == 1
    cluster = lax.axis_index("cluster")
    words = shared["picked"] if landed is None else landed
    landing = Landing(words, 4 * INDEX_SLOTS * KEYS, SLOTS, weights_plan.interpret)
    shared["landing"] = landing

    def run(number: int):
        @pl.when(cluster < summing)
        def _():
            common = {name: shared[name] for name in ("ring", "picked", "freed", "started")}
            common |= {"listed": listed, "landing": landing}
            plan = make_sums_plan(
                cluster * weights_plan.cluster + lax.axis_index("half"),
                summing * weights_plan.cluster,
            )
            _run_sums(plan, number, fresh, rows, lists, sums, common)

        @pl.when(cluster >= summing)
        def _():
            plan = make_weights_plan(summing, clusters - summing)
            _run_weights(plan, number, start, inputs, outputs, shared | own)

    for number in range(3):

        @pl.when(role == number)
        def _(number=number):
            if number == LOADER:
                plgpu.set_max_registers(40, action="decrease")
            else:
                plgpu.set_max_registers(232, action="increase")
            run(number)


def _cluster(heads: int) -> int:
    """CTAs of a cluster."""
    return 2 if heads // HEADS % 2 == 0 else 1


def clusters(heads: int, sms: int) -> int:
    """How many clusters there are, for so many heads, padded."""
    return max(2, sms // _cluster(heads))


def weights_and_sums(
    work, q, dout, out, lse, dlse, kv, indices, added, lists, sums, *,
    window, queries, rows, scale, sms, interpret=None,
):  # fmt: skip
    """P and dS of a window, bf16 `[window, K / 64, N, 64]`; and sums of rows.

    Args:
        work: i32 `[3]`: the first query of the window; how many of the `clusters` add rows up; 1 if
            the sums begin with them, whatever `sums` holds, 0 if they go on.
        q: bf16 `[all queries, N, C + R]`, N a multiple of 64.
        dout: bf16 `[all queries, N, C]`.
        out: O, as dO.
        lse: f32 `[all queries, N]`, in base 2, finite.
        dlse: f32 `[all queries, N]`.
        kv: bf16 `[batch x S, C + R]`.
        indices: i32 `[all queries, K]`, K a multiple of 64.
        added: bf16 `[window x K, C + R]`, the rows.
        lists: of the rows, as of `backward_lists.pairs_by_block`.
        sums: a `jax.Ref`, f32 `[parts, 64 blocks, C + R]`. A list is cut into parts, each with a
            sum of its own, so that few blocks keep all CTAs busy.
        window: queries of a window; what lies past the last query is left as it is.
        queries: T of a batch row.
        rows: S of a batch row.
        scale: of the scores.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.
    """
    total, heads, width = q.shape
    groups, tiles = heads // HEADS, indices.shape[-1] // KEYS
    all_clusters = clusters(heads, sms)
    cluster = _cluster(heads)
    parts, blocks = sums.shape[0], sums.shape[1] // BLOCK

    def weights_plan(first_cluster, some):
        return weights_sm90.Plan(
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
            all_clusters=all_clusters,
            first_cluster=first_cluster,
            clusters=some,
            interpret=interpret is not None,
        )

    def sums_plan(cta, ctas):
        return sum_rows_sm90.Plan(
            width=width,
            rows=added.shape[0],
            blocks=blocks,
            parts=parts,
            cta=cta,
            ctas=ctas,
            interpret=interpret is not None,
        )

    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)

    def sparse_attention_weights_and_sums(*refs, **scratch):  # its name is the kernel's
        _kernel(*refs, plans=(weights_plan, sums_plan), clusters=all_clusters, **scratch)

    def barriers(count: int, **options):
        return plgpu.Barrier(num_barriers=count, **options)

    result = jax.ShapeDtypeStruct((window, tiles, heads, KEYS), jnp.bfloat16)
    return plgpu.kernel(
        sparse_attention_weights_and_sums,
        out_type=[result, result],
        scratch_types={
            **({} if interpret is None else {"landed": barriers(SLOTS)}),
            "ring": tile(SLOTS, KEYS, share_columns(width)),
            "picked": plgpu.SMEM((INDEX_SLOTS + 1, KEYS), jnp.int32),
            "freed": barriers(SLOTS, num_arrivals=2),
            "started": barriers(1),
            "listed": barriers(sum_rows_sm90.INDEX_SLOTS, num_arrivals=2),
            "own": {
                "p_tile": tile(2, HEADS, KEYS),
                "ds_tile": tile(2, HEADS, KEYS),
                "query_full": barriers(SLOTS),
                "picked_full": barriers(INDEX_SLOTS),
                "scored": barriers(2),
                "weighed": barriers(2),
                "weights_read": barriers(2),
            },
        },
        grid=(all_clusters,),
        grid_names=("cluster",),
        cluster=(cluster,),
        cluster_names=("half",),
        num_threads=3,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({"interpret": interpret} if interpret is not None else {}),
    )(work, q, dout, out, lse, dlse, kv, indices, added, *lists, sums)
