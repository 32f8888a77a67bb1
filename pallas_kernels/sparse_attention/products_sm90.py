# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Second part of sparse attention's backward on Hopper: dQ, and what each query adds to dKV.

    dQ[n]    = sum_k dS[n, k] kv[k]                      added up over the query's keys
    rows[k]  = sum_n dS[n, k] q[n] + P[n, k] dO[n]       one row for each selected key, in bf16

A CTA computes one share of the columns (192 of 576) for queries one after the other, with all their
heads: so the rows are sums over all heads, and a gathered row is needed once. The shares of a query
are computed at about the same time by neighbouring CTAs. Three warpgroups:

    EVEN    dQ of the first 64 heads; the rows of even tiles of 64 keys
    ODD     dQ of the other heads, if there are any; the rows of odd tiles
    LOADER  fills a ring of two slots, even tiles in one and odd ones in the other

So the products of one warpgroup run while the other writes out its rows, which go through the place
in the ring that the gathered keys leave. That of a query's last tiles is where dQ goes out too.

SMEM at 576 columns and 128 heads: 49,152 each of Q and dO, 2 x (16,384 P + 16,384 dS + 24,576 keys)
of ring, 2,048 of indices. Registers of a thread: EVEN and ODD 232 (96 of dQ, 96 of rows), LOADER 40.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import TILE, Landing, gather_rows, warpgroup_barrier
from pallas_kernels.hopper.wgmma import Product, Until, multiply_add
from pallas_kernels.sparse_attention.weights_sm90 import part_columns

HEADS = 64  # of a warpgroup
KEYS = 64  # of a tile
SLOTS = 2  # of the ring, one for each of EVEN and ODD
INDEX_SLOTS = 4
EVEN, ODD, LOADER = range(3)
_REGISTERS = {EVEN: 232, ODD: 232, LOADER: 40}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of a call."""

    queries: int  # T, of one batch row
    rows: int  # S, of one batch row
    heads: int  # 64 or 128
    width: int  # C + R
    values: int  # C
    tiles: int  # of 64 selected keys, an even number
    window: int  # queries of a call, at most
    total: int  # queries of all calls
    lanes: int  # CTAs of a share
    interpret: bool

    @property
    def part(self) -> int:
        return part_columns(self.width)

    @property
    def shares(self) -> int:
        return self.width // self.part

    def value_columns(self, share: int) -> int:
        """How many columns of a share are value as well."""
        return min(max(self.values - share * self.part, 0), self.part)

    def value_start(self, share: int) -> int:
        """Where the copy of dO starts, which has the whole width of a share."""
        return min(share * self.part, self.values - self.part)


@dataclasses.dataclass(frozen=True)
class _Shared:
    """SMEM and barriers."""

    query: Any  # bf16 [N, part]
    dout_tile: Any  # bf16 [N, part]
    p_tile: Any  # bf16 [N, 64], one a slot
    ds_tile: Any  # bf16 [N, 64], one a slot
    keys: Any  # bf16 [64, part], one a slot: the keys of a tile, then its rows
    picked: Any  # i32 [INDEX_SLOTS + 1, 64]; the last row holds Landing's words
    query_full: Any
    query_read: Any  # EVEN and ODD need Q and dO no longer
    picked_full: Any
    full: Any  # P and dS of the slot are there
    read: Any  # EVEN and ODD have used P, dS and the keys of the slot
    stored: Any  # and what was written over the keys is on its way
    started: Any
    landing: Landing


def _for_each_query(plan: _Plan, first, body, carry):
    """`carry = body(query of the window, carry)` over this CTA's share of the window."""
    queries = jnp.minimum(plan.window, plan.total - first)
    mine = lax.axis_index("lane")
    count = lax.div(queries - 1 - mine + plan.lanes, jnp.int32(plan.lanes))
    return lax.fori_loop(0, count, lambda i, c: body(mine + i * plan.lanes, c), carry), count


def _load(plan: _Plan, share, first, q, dout, kv, indices, weights, dscores, s: _Shared):
    """LOADER."""
    columns = pl.ds(share * plan.part, plan.part)

    def fetch_indices(query, tile, index_slot):
        source = indices.at[first + query, pl.ds(tile * KEYS, KEYS)]
        plgpu.copy_gmem_to_smem(source, s.picked.at[index_slot], s.picked_full.at[index_slot])

    def work_item(query, carry):
        done, index_slot = carry
        fetch_indices(query, 0, index_slot)

        @pl.when(done > 0)
        def _():
            plgpu.barrier_wait(s.query_read)

        plgpu.copy_gmem_to_smem(q.at[first + query, :, columns], s.query, s.query_full)
        if plan.value_columns(share):
            some = pl.ds(plan.value_start(share), plan.part)
            plgpu.copy_gmem_to_smem(dout.at[first + query, :, some], s.dout_tile, s.query_full)

        def pair(j, index_slot):
            for slot in range(SLOTS):
                tile = 2 * j + slot

                @pl.when(done + j > 0)
                def _(slot=slot):
                    plgpu.barrier_wait(s.read.at[slot])

                if plan.value_columns(share):
                    source = weights.at[query, tile]
                    plgpu.copy_gmem_to_smem(source, s.p_tile[slot], s.full.at[slot])
                plgpu.copy_gmem_to_smem(
                    dscores.at[query, tile], s.ds_tile[slot], s.full.at[slot]
                )

                @pl.when(tile + 1 < plan.tiles)
                def _(tile=tile, index_slot=index_slot):
                    fetch_indices(query, tile + 1, lax.rem(index_slot + 1, jnp.int32(INDEX_SLOTS)))

                plgpu.barrier_wait(s.picked_full.at[index_slot])

                @pl.when(done + j > 0)
                def _(slot=slot):
                    plgpu.barrier_wait(s.stored.at[slot])

                gather_rows(
                    kv,
                    s.picked.at[index_slot],
                    s.keys[slot],
                    s.landing,
                    lax.rem(tile, jnp.int32(SLOTS)),
                    first_row=lax.div(first + query, jnp.int32(plan.queries)) * plan.rows,
                    rows=plan.rows,
                    first_column=share * plan.part,
                    columns=(0, plan.part),
                    arrive=True,
                )
                index_slot = lax.rem(index_slot + 1, jnp.int32(INDEX_SLOTS))
            return index_slot

        return done + 1, lax.fori_loop(0, plan.tiles // 2, pair, index_slot)

    plgpu.barrier_wait(s.started)
    _, count = _for_each_query(plan, first, work_item, (jnp.int32(0), jnp.int32(0)))

    @pl.when(count > 0)
    def _():
        plgpu.barrier_wait(s.query_read)
        for slot in range(SLOTS):
            plgpu.barrier_wait(s.read.at[slot])
            plgpu.barrier_wait(s.stored.at[slot])


def _zeros(columns):
    return plgpu.layout_cast(jnp.zeros((KEYS, columns), jnp.float32), plgpu.Layout.WGMMA)


def _multiply(plan: _Plan, role, share, first, dq, rows, s: _Shared):
    """EVEN and ODD."""
    values = plan.value_columns(share)
    shift = share * plan.part - plan.value_start(share) if values else 0
    columns = pl.ds(share * plan.part, plan.part)
    mine = pl.ds(role * HEADS, HEADS)
    has_heads = role * HEADS < plan.heads

    def tile(j, slot, phases, accumulators):
        """One tile: dQ, and where it is this warpgroup's the rows; all in f32."""
        plgpu.barrier_wait(s.full.at[slot])
        at = lax.rem(2 * j + slot, jnp.int32(SLOTS))  # the slot as a traced value
        p_tile, ds_tile, keys = s.p_tile[slot], s.ds_tile[slot], s.keys[slot]
        number = len(accumulators)
        steps = []
        if role == slot:
            # Apart where a share ends with columns that are no value.
            widths = [w for w in (values, plan.part - values) if w]
            accumulators = [*accumulators, *(_zeros(w) for w in widths)]
            if values:
                right = s.dout_tile.at[:, pl.ds(shift, values)]
                steps.append(Product(number, p_tile.T, right))
            for i, width in enumerate(widths):
                right = s.query.at[:, pl.ds(sum(widths[:i]), width)]
                steps.append(Product(number + i, ds_tile.T, right))
        steps.append(functools.partial(s.landing.wait, at, phases))
        if has_heads:
            steps.append(Product(0, ds_tile.at[mine], keys))
        found = multiply_add(accumulators, steps, plan.interpret)
        warpgroup_barrier(plan.interpret)
        plgpu.barrier_arrive(s.read.at[slot])
        return found[:number], found[number:], Landing.next(at, phases)

    def write_rows(query, j, found):
        """The rows of this warpgroup's tile, over the keys they were computed with."""
        plgpu.barrier_wait(s.read.at[role])
        start = 0
        for part in found:
            width = part.shape[1]
            s.keys[role].at[:, pl.ds(start, width)][...] = part.astype(jnp.bfloat16)
            start += width
        plgpu.commit_smem()
        target = rows.at[query, pl.ds((2 * j + role) * KEYS, KEYS), columns]
        plgpu.copy_smem_to_gmem(s.keys[role], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        warpgroup_barrier(plan.interpret)

    def pair(query, j, carry, *, last=False):
        accumulators, phases = carry
        for slot in range(SLOTS):
            accumulators, found, phases = tile(j, slot, phases, accumulators)
            if last and slot == SLOTS - 1:
                plgpu.barrier_arrive(s.query_read)
            if role == slot:
                write_rows(query, j, found)
                if not last:
                    plgpu.barrier_arrive(s.stored.at[role])
        return accumulators, phases

    def work_item(query, phases):
        plgpu.barrier_wait(s.query_full)
        carry = [_zeros(plan.part)] if has_heads else [], phases
        count = plan.tiles // 2
        carry = lax.fori_loop(0, count - 1, functools.partial(pair, query), carry)
        last = functools.partial(pair, query, last=True)
        accumulators, phases = lax.fori_loop(count - 1, count, last, carry)
        if has_heads:
            s.keys[role][...] = accumulators[0].astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(s.keys[role], dq.at[query, mine, columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            warpgroup_barrier(plan.interpret)
        plgpu.barrier_arrive(s.stored.at[role])
        return phases

    if role == EVEN:
        s.landing.initialize()
        plgpu.barrier_arrive(s.started)
    plgpu.barrier_wait(s.started)
    _for_each_query(plan, first, work_item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _kernel(
    first, q, dout, kv, indices, weights, dscores, dq, rows, *, plan: _Plan, **shared
):
    words = shared.pop("landed", shared["picked"])
    landing = Landing(words, 4 * INDEX_SLOTS * KEYS, SLOTS, plan.interpret)
    role = lax.axis_index("role")
    start = first[0]

    def run(number, share, query_full, full):
        s = _Shared(**shared, query_full=query_full, full=full, landing=landing)
        if number == LOADER:
            _load(plan, share, start, q, dout, kv, indices, weights, dscores, s)
        else:
            _multiply(plan, number, share, start, dq, rows, s)

    # A barrier counts the copies: one less where the share has no value columns.
    barriers = shared.pop("query_full"), shared.pop("full")
    for number in (EVEN, ODD, LOADER):

        @pl.when(role == number)
        def _(number=number):
            action = "decrease" if number == LOADER else "increase"
            plgpu.set_max_registers(_REGISTERS[number], action=action)
            for share in range(plan.shares):

                @pl.when(lax.axis_index("share") == share)
                def _(share=share):
                    copies = 1 if plan.value_columns(share) else 0
                    run(number, share, *(b[copies] for b in barriers))


def products(
    first, q, dout, kv, indices, weights, dscores, *, window, queries, rows, sms, interpret=None
):
    """dQ `[window, N, C + R]` and the rows `[window, K, C + R]` of a window of queries, in bf16.

    Args:
        first: i32 `[1]`, the first query of the window.
        q: bf16 `[all queries, N, C + R]`, N 64 or 128.
        dout: bf16 `[all queries, N, C]`.
        kv: bf16 `[batch x S, C + R]`.
        indices: i32 `[all queries, K]`, K a multiple of 128.
        weights: P, bf16 `[window, K / 64, N, 64]`.
        dscores: dS, as P.
        window: queries of the window; what lies past the last query is left as it is.
        queries: T of a batch row.
        rows: S of a batch row.
        sms: CTAs.
        interpret: parameters of interpret mode, or None.
    """
    total, heads, width = q.shape
    part = part_columns(width)
    plan = _Plan(
        queries=queries,
        rows=rows,
        heads=heads,
        width=width,
        values=dout.shape[-1],
        tiles=indices.shape[-1] // KEYS,
        window=window,
        total=total,
        lanes=max(1, min(sms // (width // part), window)),
        interpret=interpret is not None,
    )

    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILE)

    landed = {"landed": plgpu.Barrier(num_barriers=SLOTS)} if plan.interpret else {}
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=[
            jax.ShapeDtypeStruct((window, heads, width), jnp.bfloat16),
            jax.ShapeDtypeStruct((window, indices.shape[-1], width), jnp.bfloat16),
        ],
        scratch_types={
            **landed,
            "query": tile(heads, part),
            "dout_tile": tile(heads, part),
            "p_tile": [tile(heads, KEYS) for _ in range(SLOTS)],
            "ds_tile": [tile(heads, KEYS) for _ in range(SLOTS)],
            "keys": [tile(KEYS, part) for _ in range(SLOTS)],
            "picked": plgpu.SMEM((INDEX_SLOTS + 1, KEYS), jnp.int32),
            "query_full": [plgpu.Barrier(num_arrivals=n) for n in (1, 2)],
            "query_read": plgpu.Barrier(num_arrivals=2),
            "picked_full": plgpu.Barrier(num_barriers=INDEX_SLOTS),
            "full": [plgpu.Barrier(num_arrivals=n, num_barriers=SLOTS) for n in (1, 2)],
            "read": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            "stored": plgpu.Barrier(num_barriers=SLOTS),
            "started": plgpu.Barrier(),
        },
        grid=(plan.shares, plan.lanes),
        grid_names=("share", "lane"),
        num_threads=3,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({"interpret": interpret} if interpret is not None else {}),
    )(first, q, dout, kv, indices, weights, dscores)
