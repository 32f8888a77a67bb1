# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""The warpgroups of the forward kernel: scores, and the two halves of the values."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import Landing, warpgroup_barrier
from pallas_kernels.hopper.softmax import raised, rescaled
from pallas_kernels.hopper.tiles import CHUNK, LOG2E
from pallas_kernels.hopper.wgmma import Product, Until, add_products, finish, multiply_add
from pallas_kernels.sparse_attention.forward_loader import Loader
from pallas_kernels.sparse_attention.forward_plan import (
    HEADS,
    INDEX_SLOTS,
    KEYS,
    LEFT,
    LOWEST,
    SLOTS,
    Place,
    Plan,
    Shared,
    following_slot,
    for_each_work,
)


def scores(plan: Plan, tiles, full, lse, s: Shared):
    """S, the softmax, and P; at a query's last tile P and the factors are divided by the sum."""
    row = plgpu.Layout.WGMMA.reduce(1)
    column = plgpu.Layout.WGMMA.reduce(0)
    chunks = [
        (ref, pl.ds(i, CHUNK)) for ref in (s.left, s.right) for i in range(0, plan.half, CHUNK)
    ]

    # What arrives at a time, and its columns in units of CHUNK.
    middle, half = plan.middle // CHUNK, plan.half // CHUNK
    sides = [(s.left, range(middle)), (s.left, range(middle, half))]
    sides += [(s.right, columns) for _, columns in sides]
    parts = [(landing, *side) for landing, side in zip(s.landings, sides, strict=True)]

    def over_keys(x):
        return lax.broadcast_in_dim(x, (HEADS, KEYS), (0,))

    def load_query(place):
        plgpu.barrier_wait(s.query_full.at[place.slot])
        kept = []
        for ref, columns in chunks[:-1]:
            kept.append(plgpu.load(ref.at[place.slot, :, columns], layout=plgpu.Layout.WGMMA))
            # One at a time: LDSM's registers are not wgmma's, and there are none to spare.
            warpgroup_barrier(plan.interpret)
        ref, columns = chunks[-1]
        s.query_last[...] = plgpu.load(ref.at[place.slot, :, columns], layout=plgpu.Layout.WGMMA)
        if plan.tail:
            s.query_tail[...] = plgpu.load(s.tail.at[place.tail], layout=plgpu.Layout.WGMMA)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.query_read.at[place.slot])
        return kept

    def score(query, j, place, previous, index_slot, phases, tail_phases, masked):
        """Raw S. It starts from -inf where there is no key: so the softmax needs no mask."""
        plgpu.barrier_wait(s.picked_full.at[index_slot])
        start = plgpu.layout_cast(jnp.zeros((HEADS, KEYS), jnp.float32), plgpu.Layout.WGMMA)
        if masked:
            index = plgpu.load(s.picked.at[index_slot], layout=column)
            exists = jnp.logical_and(index >= 0, index < plan.rows)
            mask = jnp.where(exists, 0.0, -jnp.inf).astype(jnp.float32)
            start = lax.broadcast_in_dim(mask, (HEADS, KEYS), (1,))
        add = functools.partial(add_products, interpret=plan.interpret)
        scores, done = start, 0
        for landing, ref, columns in parts:
            landing.wait(place.slot, phases)
            kept = query[done : done + len(columns)]
            tile = ref.at[place.slot]
            if kept:
                scores = add(scores, kept, tile, columns[: len(kept)], first=not done)
            if len(kept) < len(columns):
                scores = add(scores, [s.query_last], tile, columns[-1:], first=False)
            done += len(columns)
        if plan.tail:
            s.tail_landing.wait(place.tail, tail_phases)
            scores = add(scores, [s.query_tail], s.tail.at[place.tail], [0], first=False)
        # P V of the tile before queues up behind the last product, so that the tensor core does not
        # wait for it.
        if not plan.interpret:
            plgpu.wgmma_wait(1)
        plgpu.barrier_arrive(s.scored.at[previous], predicate=j > 0)
        return finish(scores, plan.interpret)

    def tile(query, j, carry, *, masked=True, last=False):
        top, total, place, previous, index_slot, phases = carry
        scores = score(query, j, place, previous, index_slot, *phases, masked)
        phases = Landing.next(place.slot, phases[0]), Landing.next(place.tail, phases[1])
        new_top = raised(top, scores, plan.scale, plan.interpret)
        factor = jnp.exp2((top - new_top) * plan.scale)
        weights = jnp.exp2(scores * plan.scale - over_keys(new_top * plan.scale))
        total *= lax.broadcast_in_dim(factor, total.shape, (0,))
        for i in range(0, KEYS, total.shape[1]):
            total += weights[:, i : i + total.shape[1]]
        if last:
            total = total.sum(axis=1)
            inverse = jnp.where(total > 0, 1.0 / total, 0.0)
            factor *= inverse
            weights *= over_keys(inverse)
        s.tail.at[place.tail][...] = weights.astype(jnp.bfloat16)
        s.factors.at[place.slot][...] = factor
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.weighed.at[place.slot])
        if last:
            plgpu.barrier_arrive(s.scored.at[place.slot])
        return (
            new_top,
            total,
            place.next(plan),
            place.slot,
            following_slot(index_slot, INDEX_SLOTS),
            phases,
        )

    def work_item(work, carry):
        place, index_slot, phases = carry
        count = tiles[plan.query(work)]
        query = load_query(place)
        top = plgpu.layout_cast(jnp.full((HEADS,), LOWEST, jnp.float32), row)
        # Of every eighth column: summing over the four lanes that share a row can wait.
        total = plgpu.layout_cast(jnp.zeros((HEADS, 8), jnp.float32), plgpu.Layout.WGMMA)
        carry = top, total, place.next(plan), place.slot, index_slot, phases
        # Tiles without a hole, which need no mask, are the first ones, or on the way back the last.
        whole = jnp.minimum(full[plan.query(work)], count - 1)
        masked, unmasked = (functools.partial(tile, query, masked=m) for m in (True, False))
        start, stop = jnp.int32(0), whole
        if plan.sweep:
            backwards = plan.backwards(work)
            holes = jnp.minimum(count - full[plan.query(work)], count - 1)
            start, stop = jnp.where(backwards, holes, 0), jnp.where(backwards, count - 1, whole)
            carry = lax.fori_loop(0, start, masked, carry)
        carry = lax.fori_loop(start, stop, unmasked, carry)
        carry = lax.fori_loop(stop, count - 1, masked, carry)
        top, total, place, _, index_slot, phases = tile(query, count - 1, carry, last=True)
        value = jnp.where(total > 0, (top * plan.scale + jnp.log2(total)) / LOG2E, -jnp.inf)
        lse.at[plan.query(work), plan.heads(work)][...] = value
        return place, index_slot, phases

    for landing in (*s.landings, s.tail_landing):
        landing.initialize()
    plgpu.barrier_arrive(s.started)
    zero = jnp.int32(0)
    for_each_work(plan, work_item, (Place(zero, zero), zero, (zero, zero)))


def values(plan: Plan, side: int, q, kv, indices, tiles, out, s: Shared):
    """One half of the columns of O, and of the gather."""
    loader = Loader(plan, side, q, kv, indices, tiles, s)
    values = loader.ring
    parts = [pl.ds(0, plan.middle), pl.ds(plan.middle, plan.half - plan.middle)]

    def weigh(accs, place, late, entry):
        """One tile's P V. Loads meanwhile what is `late`, and `entry` where P V has passed."""
        plgpu.barrier_wait(s.weighed.at[place.slot])
        factor = plgpu.load(s.factors.at[place.slot], layout=plgpu.Layout.WGMMA.reduce(1))
        accs = rescaled(accs, factor, plan.interpret)
        plgpu.barrier_wait(s.scored.at[place.slot])

        def first_columns():
            warpgroup_barrier(plan.interpret)
            loader.load(entry, place, 0)

        steps = [
            Product(i, s.tail.at[place.tail], values.at[place.slot, :, part])
            for i, part in enumerate(parts)
        ]
        steps.append(lambda: loader.load(*late, 2))
        if entry is not None:
            steps += [Until(1), first_columns]
        accs = multiply_add(accs, steps, plan.interpret)
        if side == LEFT:
            plgpu.barrier_arrive(s.tail_read.at[place.tail])
        else:
            plgpu.barrier_wait(s.tail_read.at[place.tail])
        return accs

    def refill(place, ahead):
        """Most of what takes the place of an entry that is done; returns what is late."""
        tail_entry, entry = ahead
        loader.load_tail(tail_entry, place)
        loader.load(entry, place, 1)
        return (entry, loader.following(entry)), (entry, place)

    def work_item(work, carry):
        place, ahead, late = carry
        loader.load(*late, 2)
        plgpu.barrier_wait(s.query_read.at[place.slot])
        loader.load(ahead[1], place, 0)
        ahead, late = refill(place, ahead)

        def body(_, carry):
            accs, place, ahead, late = carry
            accs = weigh(accs, place, late, ahead[1])
            warpgroup_barrier(plan.interpret)
            return accs, place.next(plan), *refill(place, ahead)

        accs = [
            plgpu.layout_cast(jnp.zeros((HEADS, part.size), jnp.float32), plgpu.Layout.WGMMA)
            for part in parts
        ]
        count = tiles[plan.query(work)]
        carry = accs, place.next(plan), ahead, late
        accs, place, ahead, late = lax.fori_loop(0, count - 1, body, carry)
        accs = weigh(accs, place, late, None)
        warpgroup_barrier(plan.interpret)
        for acc, part in zip(accs, parts, strict=True):
            values.at[place.slot, :, part][...] = acc.astype(jnp.bfloat16)
        plgpu.commit_smem()
        target = out.at[plan.query(work), plan.heads(work), pl.ds(loader.first_column, plan.half)]
        plgpu.copy_smem_to_gmem(values.at[place.slot], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        warpgroup_barrier(plan.interpret)
        loader.load(ahead[1], place, 0)
        return place.next(plan), *refill(place, ahead)

    plgpu.barrier_wait(s.started)
    place = start = Place(jnp.int32(0), jnp.int32(0))
    previous = entry = loader.first()
    for number in range(SLOTS):
        for part in range(3):
            loader.load(entry, place, part)
        if number < plan.tails:  # `load_tail` counts from the entry two before
            before = lax.rem(place.slot + 1, jnp.int32(SLOTS))
            loader.load_tail(entry, Place(before, place.tail))
        previous, entry, place = entry, loader.following(entry), place.next(plan)
    # Nothing is late yet: an entry past the end.
    nothing = entry._replace(work=jnp.int32(plan.work))
    for_each_work(plan, work_item, (start, (previous, entry), (nothing, start)))
    plgpu.wait_smem_to_gmem(0)
