# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Second part of sparse attention's backward on Hopper: what P and dS are multiplied with.

Two kinds of CTA side by side, which have nothing to do with each other: those of `dq_sm90` wait for
the L2, which the keys come from, and those of `rows_sm90` for the memory, where the rows go. Each
query is a piece of work for one CTA of either kind and of every share of the columns.

SMEM at 576 columns and 128 heads: 4 x 16,384 of P and dS, 4 x 24,576 of keys, or of Q and dO,
2 x 24,576 of results. Registers of a thread: 216 (96 of them accumulators) where it multiplies, 40
where it loads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import Landing
from pallas_kernels.hopper.tiles import SWIZZLED
from pallas_kernels.sparse_attention import dq_sm90, rows_sm90
from pallas_kernels.sparse_attention.backward_shares import Places, share_columns

KEYS = 64  # of a tile
LOADER = 2
ROWS_LANES = 28, 44
"""How many lanes of how many are for rows: about what they take, alone, of both together."""


def _run_dq(plan, role, share, first, kv, indices, dscores, dq, places, barriers):
    words = barriers.pop("landed", barriers["picked"])
    landing = Landing(words, 4 * dq_sm90.INDEX_SLOTS * KEYS, dq_sm90.SLOTS, plan.interpret)
    s = dq_sm90.Shared(places=places, landing=landing, **barriers)
    if role == LOADER:
        dq_sm90.load(plan, share, first, kv, indices, dscores, s)
    else:
        dq_sm90.multiply(plan, role, share, first, dq, s)


def _run_rows(plan, role, share, first, q, dout, weights, dscores, rows, places, barriers):
    # A barrier counts the copies: fewer where the share has no value columns.
    copies = 1 if plan.value_columns(share) else 0
    counted = {name: barriers.pop(name)[copies] for name in ("query_full", "full")}
    s = rows_sm90.Shared(places=places, **counted, **barriers)
    if role == LOADER:
        rows_sm90.load(plan, share, first, q, dout, weights, dscores, s)
    else:
        rows_sm90.multiply(plan, role, share, first, rows, s)


def _kernel(
    first, q, dout, kv, indices, weights, dscores, dq, rows, *, plans, dq_barriers, rows_barriers,
    **places,
):  # fmt: skip
    start, role = first[0], lax.axis_index("role")
    share, lane = lax.axis_index("share"), lax.axis_index("lane")
    dq_plan, rows_plan = plans
    places = Places(**places)

    def run(number: int, of: int):
        @pl.when(lane < rows_plan.lanes)
        def _():
            arrays = q, dout, weights, dscores, rows
            _run_rows(rows_plan, number, of, start, *arrays, places, dict(rows_barriers))

        @pl.when(lane >= rows_plan.lanes)
        def _():
            arrays = kv, indices, dscores, dq
            _run_dq(dq_plan, number, of, start, *arrays, places, dict(dq_barriers))

    for number in range(3):

        @pl.when(role == number)
        def _(number=number):
            if number == LOADER:
                plgpu.set_max_registers(40, action="decrease")
            else:
                plgpu.set_max_registers(216, action="increase")
            for of in range(dq_plan.shares):
                pl.when(share == of)(functools.partial(run, number, of))


def dq_and_rows(
    first, q, dout, kv, indices, weights, dscores, dq, *, window, queries, rows, sms, interpret=None
):
    """dQ of a window of queries, and what they add to dKV, bf16 `[window, K, C + R]`.

    Args:
        first: i32 `[1]`, the first query of the window.
        q: bf16 `[all queries, N, C + R]`, N 64 or 128.
        dout: bf16 `[all queries, N, C]`.
        kv: bf16 `[batch x S, C + R]`.
        indices: i32 `[all queries, K]`, K a multiple of 128.
        weights: P, bf16 `[window, K / 64, N, 64]`.
        dscores: dS, as P.
        dq: a `jax.Ref` like q, of which the window is written.
        window: queries of the window; what lies past the last query is left as it is.
        queries: T of a batch row.
        rows: S of a batch row.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.
    """
    total, heads, width = q.shape
    part = share_columns(width)
    lanes = max(2, min(sms // (width // part), 2 * window))
    of_rows = max(1, lanes * ROWS_LANES[0] // ROWS_LANES[1])
    common: dict[str, Any] = {
        "width": width,
        "tiles": indices.shape[1] // KEYS,
        "window": window,
        "total": total,
        "heads": heads,
        "interpret": interpret is not None,
    }
    plans = (
        dq_sm90.Plan(
            **common, first_lane=of_rows, lanes=lanes - of_rows, queries=queries, rows=rows
        ),
        rows_sm90.Plan(**common, first_lane=0, lanes=of_rows, values=dout.shape[-1]),
    )

    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)

    def barriers(count: int, **options):
        return plgpu.Barrier(num_barriers=count, **options)

    pieces, slots = heads // rows_sm90.HEADS, rows_sm90.SLOTS
    landed = {"landed": barriers(dq_sm90.SLOTS)} if interpret is not None else {}

    def sparse_attention_products(*refs, **scratch):  # its name is the kernel's
        _kernel(*refs, plans=plans, **scratch)

    return plgpu.kernel(
        sparse_attention_products,
        out_type=jax.ShapeDtypeStruct((window, indices.shape[1], width), jnp.bfloat16),
        scratch_types={
            "by_head": tile(4, heads, KEYS),
            "columns": tile(4, KEYS, part),
            "out_tile": tile(2, KEYS, part),
            "dq_barriers": {
                **landed,
                "picked": plgpu.SMEM((dq_sm90.INDEX_SLOTS + 1, KEYS), jnp.int32),
                "picked_full": barriers(dq_sm90.INDEX_SLOTS),
                "full": barriers(dq_sm90.SLOTS),
                "freed": barriers(dq_sm90.SLOTS, num_arrivals=2),
                "started": barriers(1),
            },
            "rows_barriers": {
                "query_full": [barriers(1, num_arrivals=n * pieces) for n in (1, 2)],
                "query_read": barriers(1, num_arrivals=2),
                "full": [barriers(slots, num_arrivals=n) for n in (1, 2)],
                "freed": barriers(slots),
            },
        },
        grid=(plans[0].shares, lanes),
        grid_names=("share", "lane"),
        num_threads=3,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({"interpret": interpret} if interpret is not None else {}),
    )(first, q, dout, kv, indices, weights, dscores, dq)
