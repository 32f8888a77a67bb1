# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""The gradient of the selected keys' indexer scores on Hopper, given that of the scores.

    x[k, i]   = g[t] d[t, k] if iq[t, i] . ik[s] > 0 else 0                s = indices[t, k]
    u[i]      = sum_k x[k, i] ik[s]
    diq[t, i] = iw[t, i] u[i]             diw[t, i] = iq[t, i] . u[i]
    rows[t, k] = sum_i iw[t, i] x[k, i] iq[t, i]

(relu(z) = z 1[z > 0], so diw needs no product of its own.) A row is what a query adds to dik of a
selected key. Where dik fits the L2, rows are added up there, as integers (`hopper.fixed_point`);
else they are stored, in bf16, and the rows of a key are added up elsewhere. Three warpgroups:

    EVEN, ODD  a query each, its selected keys in tiles of 64
    LOADER     gathers the keys of both into a ring of each

The products of one warpgroup run while the other masks, or parts with its rows.

SMEM at H = 128: 2 x 3 x 16,384 of rings, and of each warpgroup 16,384 of iq, 8,192 of x and 2 x
16,384 of rows on their way out. Registers of a thread: EVEN and ODD 232 (64 of u, 64 of rows, 32 of
dot products), LOADER 40.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import fixed_point, roles, signs
from pallas_kernels.hopper.gather import LANES, Landing, gather_rows, warpgroup_barrier
from pallas_kernels.hopper.tiles import SWIZZLED
from pallas_kernels.hopper.wgmma import Product, multiply_add
from pallas_kernels.sparse_attention.backward_shares import drain, next_slot

HEADS = 64  # I
KEYS = 64  # of a tile
SLOTS = 3  # of a ring
INDEX_SLOTS = SLOTS + 1  # of each warpgroup: refilled when the rows of its last tile have landed
EVEN, ODD = _CONSUMERS = 0, 1
_REGISTERS = 232, 232, 40  # of EVEN, ODD, LOADER


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of a call."""

    queries: int  # T, of one batch row
    rows: int  # S, of one batch row
    width: int  # H
    window: int  # queries of a call, at most
    total: int  # queries of all calls
    ctas: int
    interpret: bool

    def count(self, first, role):
        """How many queries of the window from `first` on fall to a warpgroup of this CTA."""
        mine = lax.axis_index("cta") * 2 + role
        queries = jnp.minimum(self.window, self.total - first)
        return lax.div(queries - 1 - mine + 2 * self.ctas, jnp.int32(2 * self.ctas))

    def query(self, number, role):
        """Its so-many-th query, counted from the start of the window."""
        return lax.axis_index("cta") * 2 + role + number * (2 * self.ctas)


@dataclasses.dataclass(frozen=True)
class _Shared:
    """SMEM and barriers; of what both warpgroups have, that of EVEN comes first."""

    query: Any  # bf16 [2 x 64, H]: iq; diq in the end
    ring: Any  # bf16 [2 x SLOTS, 64, H]
    slopes: Any  # f32 [2 x SLOTS, 64]: d of the ring's keys
    signs: Any  # i32 [2 x SLOTS, 128]: which of their products are positive
    masked: Any  # bf16 [2 x 64, 64]: x
    out_tile: Any  # bf16 [2 x 2, 64, H], rows on their way to the memory; or i32 [2, 64, H], sums'
    picked: Any  # i32 [2 x INDEX_SLOTS + 1, 64]; the last row holds Landing's words
    picked_full: Any
    query_full: Any
    full: Any  # d and signs of the slot are there
    freed: list[Any]  # and no longer needed, nor the keys
    started: Any
    landing: Landing


def _load(plan: _Plan, first, ik, indices, d, positive, tiles, s: _Shared):
    """LOADER."""

    def fetch_indices(query, tile, at):
        source = indices.at[query, pl.ds(tile * KEYS, KEYS)]
        plgpu.copy_gmem_to_smem(source, s.picked.at[at], s.picked_full.at[at])

    def fill(role, query, count, j, state):
        slot, filled, index_slot = state
        following = next_slot(index_slot, INDEX_SLOTS)
        at, index_at = role * SLOTS + slot, role * INDEX_SLOTS + index_slot

        @pl.when(filled >= SLOTS)
        def _():
            plgpu.barrier_wait(s.freed[role].at[slot])

        # What was there is no longer read: its rows have landed.
        @pl.when(j + 1 < count)
        def _():
            fetch_indices(query, j + 1, role * INDEX_SLOTS + following)

        some = pl.ds(j * KEYS, KEYS)
        plgpu.copy_gmem_to_smem(d.at[query, some], s.slopes.at[at], s.full.at[at])
        plgpu.copy_gmem_to_smem(positive.at[query, j], s.signs.at[at], s.full.at[at])
        plgpu.barrier_wait(s.picked_full.at[index_at])
        gather_rows(
            ik,
            s.picked.at[index_at],
            s.ring.at[at],
            s.landing,
            at,
            first_row=lax.div(query, jnp.int32(plan.queries)) * plan.rows,
            rows=plan.rows,
            first_column=0,
            columns=(0, plan.width),
            arrive=True,
        )
        return next_slot(slot, SLOTS), filled + 1, following

    def queries(number, states):
        mine = []
        for role in _CONSUMERS:
            exists = number < plan.count(first, role)
            query = first + plan.query(number, role)
            count = jnp.where(exists, tiles[jnp.where(exists, query, 0)], 0)
            mine.append((query, count))

            @pl.when(exists)
            def _(role=role, query=query):
                fetch_indices(query, 0, role * INDEX_SLOTS + states[role][2])

        def tile(j, states):
            return tuple(
                lax.cond(
                    j < mine[role][1],
                    functools.partial(fill, role, *mine[role], j),
                    lambda state: state,
                    states[role],
                )
                for role in _CONSUMERS
            )

        return lax.fori_loop(0, jnp.maximum(mine[EVEN][1], mine[ODD][1]), tile, states)

    plgpu.barrier_wait(s.started)
    zero = jnp.int32(0)
    start = ((zero, zero, zero),) * 2
    states = lax.fori_loop(0, plan.count(first, EVEN), queries, start)
    for role, (slot, filled, _) in enumerate(states):
        drain(s.freed[role], slot, filled, SLOTS)


class _Added(NamedTuple):
    """What it takes to add rows up in the L2."""

    per_one: Any  # f32 [batch x S]: of `fixed_point.units`
    sums: Any  # i32 [batch x S, H]
    indices: Any  # i32 [all queries, K]


def _target(plan: _Plan, query, j, into: _Added):
    """`(keys, what makes a term an integer, first key)` of a tile's rows."""
    picked = into.indices.at[query, pl.ds(j * KEYS, KEYS)]
    keys = plgpu.load(picked, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    first = lax.div(query, jnp.int32(plan.queries)) * plan.rows
    return keys, fixed_point.look_up(into.per_one, keys + first, plan.interpret), first


def _multiply(
    plan: _Plan, role: int, first, iq, iw, g, tiles, into: _Added | None, rows, diq, diw, s: _Shared
):
    """EVEN or ODD."""
    row, column = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))
    mine = pl.ds(role * HEADS, HEADS)
    own, masked = s.query.at[mine], s.masked.at[mine]

    def zeros(width):
        return plgpu.layout_cast(jnp.zeros((KEYS, width), jnp.float32), plgpu.Layout.WGMMA)

    def tile(query, weight, factor, j, carry):
        u, slot, phases = carry
        at = role * SLOTS + slot
        keys = s.ring.at[at]
        target = () if into is None else _target(plan, first + query, j, into)
        plgpu.barrier_wait(s.full.at[at])
        slope = plgpu.load(s.slopes.at[at], layout=row, optimized=False)
        positive = plgpu.load(s.signs.at[at], layout=signs.WORDS)
        x = signs.where_positive(positive, slope * factor, plan.interpret)
        masked[...] = x.astype(jnp.bfloat16)
        weighed = (x * lax.broadcast_in_dim(weight, x.shape, [1])).astype(jnp.bfloat16)
        plgpu.commit_smem()
        wait = functools.partial(s.landing.wait, at, phases)
        products = [Product(1, weighed, own), wait, Product(0, masked.T, keys)]
        u, added = multiply_add([u, zeros(plan.width)], products, plan.interpret)
        if into is None:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        warpgroup_barrier(plan.interpret)
        plgpu.barrier_arrive(s.freed[role].at[slot])
        if into is None:
            out_tile = s.out_tile.at[2 * role + lax.rem(j, jnp.int32(2))]
            out_tile[...] = added.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, rows.at[query, pl.ds(j * KEYS, KEYS)])
        else:
            options = {"limit": plan.rows, "interpret": plan.interpret}
            fixed_point.add_rows(into.sums, added, *target, s.out_tile.at[role], **options)
        return u, next_slot(slot, SLOTS), Landing.next(at, phases)

    def work_item(number, carry):
        query = plan.query(number, role)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        warpgroup_barrier(plan.interpret)
        plgpu.copy_gmem_to_smem(iq.at[first + query], own, s.query_full.at[role])
        weight = plgpu.load(iw.at[first + query], layout=column, optimized=False)
        plgpu.barrier_wait(s.query_full.at[role])
        body = functools.partial(tile, query, weight, g[first + query])
        u, *carry = lax.fori_loop(0, tiles[first + query], body, (zeros(plan.width), *carry))
        weight = plgpu.load(iw.at[first + query], layout=row, optimized=False)
        value = plgpu.load(own, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        diw.at[query][...] = (value * u).sum(axis=1)
        own[...] = (u * lax.broadcast_in_dim(weight, u.shape, [0])).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, diq.at[query])
        return tuple(carry)

    if role == EVEN:
        s.landing.initialize()
        plgpu.barrier_arrive(s.started)
    plgpu.barrier_wait(s.started)
    lax.fori_loop(0, plan.count(first, role), work_item, (jnp.int32(0), jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)


def gradient(
    first, iq, ik, iw, d, positive, g, indices, tiles, *,
    queries, rows, window, sms, per_one=None, sums=None, interpret=None,
):  # fmt: skip
    """`[rows bf16 [window, K, H], diq bf16 [window, 64, H], diw f32 [window, 64]]` of a window.

    Rows are undefined in tiles without a key. With `sums` there are none: they are added to these.

    Args:
        first: i32 `[1]`, the first query of the window.
        iq: bf16 `[all queries, 64, H]`.
        ik: bf16 `[batch x S, H]`.
        iw: f32 `[all queries, 64]`.
        d: f32 `[all queries, K]`, the gradient of kl for the scores; 0 where no key is selected.
        positive: i32 `[all queries, K / 64, 128]`, from `sparse_pairs_sm90.pairs`.
        g: f32 `[all queries]`, the gradient of kl.
        indices: i32 `[all queries, K]`, K a multiple of 64; S where no key is selected.
        tiles: i32 `[all queries]`, how many tiles of 64 hold a key, at least 1.
        queries: T of a batch row.
        rows: S of a batch row.
        window: queries of the window; what lies past the last query is left as it is.
        sms: CTAs.
        per_one: f32 `[batch x S]`, of `fixed_point.units`; None without sums.
        sums: a `jax.Ref`, i32 `[batch x S, H]`, or None.
        interpret: parameters of interpret mode, or None.
    """
    total, _, width = iq.shape
    plan = _Plan(
        queries=queries,
        rows=rows,
        width=width,
        window=window,
        total=total,
        ctas=min(sms, pl.cdiv(window, 2)),
        interpret=interpret is not None,
    )

    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)

    def assign(first, iq, ik, iw, d, positive, g, indices, tiles, *refs, **shared):
        into = None if sums is None else _Added(*refs[:2], indices)
        rows, diq, diw = [None, *refs][-3:]
        s, start = _Shared(**shared), first[0]
        multiply = functools.partial(_multiply, plan)
        return (
            lambda: multiply(EVEN, start, iq, iw, g, tiles, into, rows, diq, diw, s),
            lambda: multiply(ODD, start, iq, iw, g, tiles, into, rows, diq, diw, s),
            lambda: _load(plan, start, ik, indices, d, positive, tiles, s),
        )

    return roles.kernel(
        "indexer_loss_gradient",
        assign,
        _REGISTERS,
        out_type=[
            *[jax.ShapeDtypeStruct((window, indices.shape[1], width), jnp.bfloat16)]
            * (sums is None),
            jax.ShapeDtypeStruct((window, HEADS, width), jnp.bfloat16),
            jax.ShapeDtypeStruct((window, HEADS), jnp.float32),
        ],
        scratch_types={
            "query": tile(2 * HEADS, width),
            "ring": tile(2 * SLOTS, KEYS, width),
            "slopes": plgpu.SMEM((2 * SLOTS, KEYS), jnp.float32),
            "signs": plgpu.SMEM((2 * SLOTS, LANES), jnp.int32),
            "masked": tile(2 * KEYS, HEADS),
            "out_tile": (
                tile(2 * 2, KEYS, width)
                if sums is None
                else plgpu.SMEM((2, KEYS, width), jnp.int32)
            ),
            "picked": plgpu.SMEM((2 * INDEX_SLOTS + 1, KEYS), jnp.int32),
            "picked_full": plgpu.Barrier(num_barriers=2 * INDEX_SLOTS),
            "query_full": plgpu.Barrier(num_barriers=2),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=2 * SLOTS),
            "freed": [plgpu.Barrier(num_barriers=SLOTS) for _ in _CONSUMERS],
            "started": plgpu.Barrier(),
        },
        landing_slots=2 * SLOTS,
        grid={"cta": plan.ctas},
        interpret=interpret,
    )(first, iq, ik, iw, d, positive, g, indices, tiles, *([] if sums is None else [per_one, sums]))
