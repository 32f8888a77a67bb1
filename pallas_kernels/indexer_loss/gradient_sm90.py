# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""The gradient of indexer scores on Hopper, given that of the scores of a window of queries.

    x[t, i, s] = d[t, s] if iq[t, i] . ik[s] > 0 else 0
    u[t, i]    = sum_s x[t, i, s] ik[s]
    diq[t, i]  = iw[t, i] u[t, i]        diw[t, i] = iq[t, i] . u[t, i]
    dik[s]     = sum_ti iw[t, i] x[t, i, s] iq[t, i]

(relu(z) = z 1[z > 0], so diw needs no product of its own.) Two kernels, both like an attention
whose weights are a mask, and both computing iq . ik anew:

`of_queries`: a CTA takes two queries, their 64 heads the 64 rows of each of two consumer
warpgroups, through the live tiles of 128 keys. d of a query is a vector along the keys.
`of_keys`: a CTA takes 128 keys, 64 a consumer, through 512 queries of the window, two at a time.
Its sum is a part of dik; parts are added up in a fixed order outside.

A tile of ik (of iq) is a factor of both products, so that it is loaded once. Consumers take turns:
one multiplies while the other masks. What is multiplied in a turn is the masked tile, and the next
one's iq . ik: so all of a turn is in flight at once, and a consumer waits once a tile.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.tiles import SWIZZLED
from pallas_kernels.hopper.wgmma import Product, multiply, multiply_add
from pallas_kernels.indexer_loss.target_sm90 import PAIR

HEADS = 64  # I: rows of a wgmma
TILE = 128  # keys
CONSUMERS = 2
_PAIRS_OF_PART = 2  # few: so that CTAs are many, and alike under a causal range
STAGES, KEYS_STAGES = 4, 3  # of `of_queries` and `of_keys`
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 240, 24


class Problem(NamedTuple):
    """What is static of a call.

    Attributes:
        batch: B.
        width: H.
        keys: S, whole tiles.
        queries: queries of a window, whole pairs of tiles.
        total: T, beyond which a window has nothing to do.
        interpret: parameters of the GPU interpreter, or None.
    """

    batch: int
    width: int
    keys: int
    queries: int
    total: int
    interpret: Any = None

    @property
    def parts(self) -> int:
        """Into how many sums the queries of a window are cut."""
        return pl.cdiv(self.queries // PAIR, _PAIRS_OF_PART)


class Live(NamedTuple):
    """Tiles of keys that are live for a pair of tiles of queries: i32 `[B, T' / PAIR]`."""

    first: Any
    count: Any


def of_queries(first, iq, ik, iw, d, live: Live, problem: Problem):
    """`(diq bf16 [B, queries * I, H], diw f32 [B, queries * I])` of a window.

    Args:
        first: i32, the query at which the window starts, a multiple of `PAIR`.
        iq: `[B, T * I, H]` bf16, I = 64.
        ik: `[B, S, H]` bf16.
        iw: f32 `[B, T' * I]`, padded to whole windows.
        d: bf16 `[B, queries, S]`, the gradient of the scores; undefined in tiles not live.
        live: tiles of all queries.
        problem: what is static.
    """
    p = problem
    kernel = plgpu.kernel(
        functools.partial(_queries_body, p),
        out_type=(
            jax.ShapeDtypeStruct((p.batch, p.queries * HEADS, p.width), iq.dtype),
            jax.ShapeDtypeStruct((p.batch, p.queries * HEADS), jnp.float32),
        ),
        scratch_types=_QueriesScratch(
            iq=plgpu.SMEM((CONSUMERS, HEADS, p.width), iq.dtype, transforms=SWIZZLED),
            ik=plgpu.SMEM((STAGES, TILE, p.width), iq.dtype, transforms=SWIZZLED),
            d=plgpu.SMEM((STAGES, CONSUMERS, TILE), jnp.bfloat16),
            diw=plgpu.SMEM((CONSUMERS, HEADS), jnp.float32),
            iq_full=plgpu.Barrier(num_barriers=CONSUMERS),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
            turn=plgpu.Barrier(num_barriers=CONSUMERS),
        )._asdict(),
        grid=(p.batch * p.queries // CONSUMERS,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="dsa_indexer_gradient_queries",
        interpret=p.interpret,
    )
    return kernel(jnp.asarray(first, jnp.int32)[None], iq, ik, iw, d, *live)


class _QueriesScratch(NamedTuple):
    iq: Any  # [consumers, 64, H]; diq in the end
    ik: Any  # [stages, 128, H]
    d: Any  # [stages, consumers, 128]
    diw: Any  # [consumers, 64]
    iq_full: Any
    full: Any
    free: Any
    turn: Any


def _queries_body(p: Problem, first, iq, ik, iw, d, /, *refs, **scratch):
    live, (diq, diw), smem = Live(*refs[:2]), refs[2:], _QueriesScratch(**scratch)
    ctas = p.queries // CONSUMERS
    batch = lax.div(lax.axis_index("cta"), ctas)
    # Late queries see most under a causal range: they start first.
    row = (ctas - 1 - lax.rem(lax.axis_index("cta"), ctas)) * CONSUMERS
    pair = lax.div(first[0] + row, PAIR)
    low, count = live.first[batch, pair], live.count[batch, pair]
    count = jnp.where(first[0] + row < p.total, count, 0)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

        def load(step, _):
            slot = lax.rem(step, STAGES)
            keys = pl.ds((low + step) * TILE, TILE)
            pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
            plgpu.copy_gmem_to_smem(ik.at[batch, keys], smem.ik.at[slot], smem.full.at[slot])
            plgpu.copy_gmem_to_smem(
                d.at[batch, pl.ds(row, CONSUMERS), keys], smem.d.at[slot], smem.full.at[slot]
            )

        lax.fori_loop(0, count, load, None)
        for slot in range(STAGES):
            pl.when(slot < count)(lambda slot=slot: plgpu.barrier_wait(smem.free.at[slot]))

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        mine, full = smem.iq.at[warpgroup], smem.iq_full.at[warpgroup]
        query = first[0] + row + warpgroup
        plgpu.copy_gmem_to_smem(iq.at[batch, pl.ds(query * HEADS, HEADS)], mine, full)
        weight = plgpu.load(
            iw.at[batch, pl.ds(query * HEADS, HEADS)],
            layout=plgpu.Layout.WGMMA.reduce(1), optimized=False,
        )  # fmt: skip
        plgpu.barrier_wait(full)
        total = _sum_keys(p, warpgroup, count, smem)
        own = plgpu.load(mine, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        smem.diw.at[warpgroup][...] = (own * total).sum(axis=1)
        gradient = total * lax.broadcast_in_dim(weight, total.shape, [0])
        mine[...] = gradient.astype(iq.dtype)
        plgpu.commit_smem()
        rows = pl.ds((row + warpgroup) * HEADS, HEADS)
        plgpu.copy_smem_to_gmem(mine, diq.at[batch, rows])
        plgpu.copy_smem_to_gmem(smem.diw.at[warpgroup], diw.at[batch, rows])
        plgpu.wait_smem_to_gmem(0)


def _take_turns(turn, warpgroup, work):
    """`work()` between waiting for this consumer's turn to multiply and giving it to the other."""
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
    result = work(
        functools.partial(plgpu.barrier_wait, turn.at[warpgroup]),
        functools.partial(plgpu.barrier_arrive, turn.at[1 - warpgroup]),
    )
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
    return result


def _zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _sum_keys(p: Problem, warpgroup, count, smem: _QueriesScratch):
    """u of a query: f32 [64, H]."""
    interpret = p.interpret is not None
    own = smem.iq.at[warpgroup]

    def arrival(step):
        pl.when(step < count)(lambda: plgpu.barrier_wait(smem.full.at[lax.rem(step, STAGES)]))

    def tile(wait, hand_over, step, carry):
        total, dots = carry
        slot = lax.rem(step, STAGES)
        # After the last tile it is multiplied once more, for nobody.
        following = lax.rem(jnp.minimum(step + 1, count - 1), STAGES)
        column = plgpu.Layout.WGMMA.reduce(0)
        d = plgpu.load(smem.d.at[slot, warpgroup], layout=column, optimized=False)
        d = lax.broadcast_in_dim(d.astype(jnp.float32), dots.shape, [1])
        masked = jnp.where(dots > 0, d, 0.0).astype(jnp.bfloat16)
        arrival(step + 1)
        wait()
        products = [
            Product(0, masked, smem.ik.at[slot]),
            Product(1, own, smem.ik.at[following].T),
            hand_over,
        ]
        total, dots = multiply_add([total, _zeros(HEADS, TILE)], products, interpret)
        plgpu.barrier_arrive(smem.free.at[slot])
        return total, dots

    def tiles(wait, hand_over):
        arrival(0)
        dots = multiply((HEADS, TILE), [(own, smem.ik.at[0].T)], interpret)
        body = functools.partial(tile, wait, hand_over)
        return lax.fori_loop(0, count, body, (_zeros(HEADS, p.width), dots))[0]

    return _take_turns(smem.turn, warpgroup, tiles)


def of_keys(first, iq, ik, iw, d, live: Live, problem: Problem):
    """Parts of dik, `f32 [B, parts, S, H]`, of a window: arguments as in `of_queries`."""
    p = problem
    kernel = plgpu.kernel(
        functools.partial(_keys_body, p),
        out_type=jax.ShapeDtypeStruct((p.batch, p.parts, p.keys, p.width), jnp.float32),
        scratch_types=_KeysScratch(
            ik=plgpu.SMEM((CONSUMERS, 64, p.width), ik.dtype, transforms=SWIZZLED),
            iq=plgpu.SMEM((KEYS_STAGES, 2 * HEADS, p.width), ik.dtype, transforms=SWIZZLED),
            d=plgpu.SMEM((KEYS_STAGES, 2, TILE), jnp.bfloat16),
            iw=plgpu.SMEM((KEYS_STAGES, 2 * HEADS), jnp.float32),
            dik=plgpu.SMEM(
                (CONSUMERS, 64, p.width), jnp.float32,
                transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
            ),
            ik_full=plgpu.Barrier(num_barriers=CONSUMERS),
            full=plgpu.Barrier(num_arrivals=3, num_barriers=KEYS_STAGES),
            free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=KEYS_STAGES),
            turn=plgpu.Barrier(num_barriers=CONSUMERS),
        )._asdict(),
        grid=(p.batch * p.parts * (p.keys // TILE),),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="dsa_indexer_gradient_keys",
        interpret=p.interpret,
    )  # fmt: skip
    return kernel(jnp.asarray(first, jnp.int32)[None], iq, ik, iw, d, *live)


class _KeysScratch(NamedTuple):
    ik: Any  # [consumers, 64, H]
    iq: Any  # [stages, 2 * 64, H]
    d: Any  # [stages, 2, 128]
    iw: Any  # [stages, 2 * 64]
    dik: Any  # f32 [consumers, 64, H]
    ik_full: Any
    full: Any
    free: Any
    turn: Any


def _keys_body(p: Problem, first, iq, ik, iw, d, /, *refs, **scratch):
    live, dik, smem = Live(*refs[:2]), refs[2], _KeysScratch(**scratch)
    tiles, pairs = p.keys // TILE, p.queries // PAIR
    i = lax.axis_index("cta")
    batch, i = lax.div(i, tiles * p.parts), lax.rem(i, tiles * p.parts)
    tile, part = lax.div(i, p.parts), lax.rem(i, p.parts)
    warpgroup = lax.axis_index("warpgroup")

    some_pairs = jnp.minimum(_PAIRS_OF_PART, pairs - part * _PAIRS_OF_PART)

    def steps(j):
        """How many steps of two queries the part's j-th pair of tiles takes, if it is seen."""
        pair = part * _PAIRS_OF_PART + j
        since = tile - live.first[batch, lax.div(first[0], PAIR) + pair]
        seen = (since >= 0) & (since < live.count[batch, lax.div(first[0], PAIR) + pair])
        left = lax.div(p.total - (first[0] + pair * PAIR) + 1, 2)
        return jnp.where(seen, jnp.clip(left, 0, PAIR // 2), 0)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

        def load(step, row):
            slot = lax.rem(step, KEYS_STAGES)
            pl.when(step >= KEYS_STAGES)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
            rows = pl.ds((first[0] + row) * HEADS, 2 * HEADS)
            keys = pl.ds(tile * TILE, TILE)
            plgpu.copy_gmem_to_smem(iq.at[batch, rows], smem.iq.at[slot], smem.full.at[slot])
            plgpu.copy_gmem_to_smem(iw.at[batch, rows], smem.iw.at[slot], smem.full.at[slot])
            plgpu.copy_gmem_to_smem(
                d.at[batch, pl.ds(row, 2), keys], smem.d.at[slot], smem.full.at[slot]
            )

        def of_pair(j, before):
            row, count = (part * _PAIRS_OF_PART + j) * PAIR, steps(j)
            lax.fori_loop(0, count, lambda n, _: load(before + n, row + 2 * n), None)
            return before + count

        loaded = lax.fori_loop(0, some_pairs, of_pair, jnp.int32(0))
        for slot in range(KEYS_STAGES):
            pl.when(slot < loaded)(lambda slot=slot: plgpu.barrier_wait(smem.free.at[slot]))

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        keys = pl.ds(tile * TILE + warpgroup * 64, 64)
        plgpu.copy_gmem_to_smem(
            ik.at[batch, keys], smem.ik.at[warpgroup], smem.ik_full.at[warpgroup]
        )
        plgpu.barrier_wait(smem.ik_full.at[warpgroup])
        count = lax.fori_loop(0, some_pairs, lambda j, count: count + steps(j), jnp.int32(0))
        total = _sum_queries(p, warpgroup, count, smem)
        smem.dik.at[warpgroup][...] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.dik.at[warpgroup], dik.at[batch, part, keys])
        plgpu.wait_smem_to_gmem(0)


def _sum_queries(p: Problem, warpgroup, count, smem: _KeysScratch):
    """A consumer's part of dik: f32 [64, H]."""
    interpret = p.interpret is not None
    row, column = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))
    own = smem.ik.at[warpgroup]
    keys = pl.ds(warpgroup * 64, 64)

    def arrival(step):
        pl.when(step < count)(lambda: plgpu.barrier_wait(smem.full.at[lax.rem(step, KEYS_STAGES)]))

    def tokens(wait, hand_over, step, carry):
        total, dots = carry
        slot = lax.rem(step, KEYS_STAGES)
        # After the last queries they are multiplied once more, for nobody.
        following = lax.rem(jnp.minimum(step + 1, count - 1), KEYS_STAGES)
        masked = []
        for token in range(2):
            heads = slice(token * HEADS, (token + 1) * HEADS)
            some = dots[:, heads]
            d = plgpu.load(smem.d.at[slot, token, keys], layout=row, optimized=False)
            weight = plgpu.load(
                smem.iw.at[slot, pl.ds(token * HEADS, HEADS)], layout=column, optimized=False
            )
            product = lax.broadcast_in_dim(
                d.astype(jnp.float32), some.shape, [0]
            ) * lax.broadcast_in_dim(weight, some.shape, [1])
            masked.append(jnp.where(some > 0, product, 0.0).astype(jnp.bfloat16))
        arrival(step + 1)
        wait()
        products = [
            Product(0, masked[token], smem.iq.at[slot, pl.ds(token * HEADS, HEADS)])
            for token in range(2)
        ]
        products += [Product(1, own, smem.iq.at[following].T), hand_over]
        total, dots = multiply_add([total, _zeros(64, 2 * HEADS)], products, interpret)
        plgpu.barrier_arrive(smem.free.at[slot])
        return total, dots

    def all_queries(wait, hand_over):
        arrival(0)
        dots = multiply((64, 2 * HEADS), [(own, smem.iq.at[0].T)], interpret)
        body = functools.partial(tokens, wait, hand_over)
        return lax.fori_loop(0, count, body, (_zeros(64, p.width), dots))[0]

    return _take_turns(smem.turn, warpgroup, all_queries)
