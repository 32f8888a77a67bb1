"""Picks the winners of a cut out of a buffer in shared memory, in the buffer's order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels.hopper.histogram import Cut
from pallas_kernels.hopper.scan import scan_block
from pallas_kernels.hopper.simt import Words


def keep(
    block: Any, totals: Words, keys: Words, others: Callable, cut: Cut, count: Any, sink: Callable
) -> None:
    """Hands the winners to `sink(slot, key, other, where)`, numbered from 0 in order.

    A step reads entries, passes a barrier, and writes at or before where it read: the buffer
    itself may be what the sink writes. It must be as `find_cut` leaves it, with keys of 0 from
    `count` to a whole `stride`.

    Args:
        block: the lanes.
        totals: scratch of 64 words.
        keys: what the cut divides.
        others: `others(i)` is what goes with the keys i to i + 3.
        cut: from `find_cut`.
        count: of the buffer.
        sink: what to do with a winner; `where` says in which lanes there is one.
    """
    arguments = block, totals, keys, others, cut, count, sink
    block.when(cut.quota == 0, lambda _: keep_above(*arguments))
    block.when(cut.quota != 0, lambda _: _keep_tied(*arguments))


def keep_above(block, totals, keys, others, cut, count, sink):
    """`keep` where no tie is to be divided."""
    half = 4 * block.threads

    def step(i, state):
        so_far, turn = state
        at = i + block.thread * 4
        halves = [block.load4(keys, at), block.load4(keys, at + half)]
        beside = [others(at), others(at + half)]
        mine = block.constant(0)  # 16 bits a half
        for h in range(2):
            for key in halves[h]:
                mine = block.add_where(key >= cut.above, mine, 1 << (16 * h))
        before, total = scan_block(block, totals, mine, turn)
        first, second = total & 0xFFFF, total >> 16
        slots = [so_far + (before & 0xFFFF), so_far + first + (before >> 16)]
        for slot, four_keys, four_others in zip(slots, halves, beside, strict=True):
            for key, other in zip(four_keys, four_others, strict=True):
                wins = key >= cut.above
                sink(slot, key, other, wins)
                slot = block.add_where(wins, slot, 1)
        return so_far + first + second, turn ^ 1

    zero = block.constant(0)
    block.loop(0, count, 2 * half, (zero, zero), step)
    return ()


def _keep_tied(block, totals, keys, others, cut, count, sink):
    """`keep` where only some of the keys on the cut win: those that come first."""

    def step(i, state):
        so_far, turn = state  # winners above the cut, and 65536 for each key on it
        at = i + block.thread * 4
        four_keys, four_others = block.load4(keys, at), others(at)
        weights = [
            block.select(key >= cut.above, 1, block.select(key == cut.above - 1, 1 << 16, 0))
            for key in four_keys
        ]
        mine = weights[0] + weights[1] + weights[2] + weights[3]
        before, total = scan_block(block, totals, mine, turn)
        before = before + so_far
        for key, other, weight in zip(four_keys, four_others, weights, strict=True):
            tied = before >> 16
            slot = (before & 0xFFFF) + block.minimum(tied, cut.quota)
            wins = (weight == 1) | ((weight == 1 << 16) & (tied < cut.quota))
            sink(slot, key, other, wins)
            before = before + weight
        return so_far + total, turn ^ 1

    zero = block.constant(0)
    block.loop(0, count, 4 * block.threads, (zero, zero), step)
    return ()
