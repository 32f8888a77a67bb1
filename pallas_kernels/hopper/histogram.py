"""The k-th largest of many 32-bit numbers in shared memory, by histograms: a radix select."""

from __future__ import annotations

from typing import Any, NamedTuple

from pallas_kernels.hopper.scan import scan_block
from pallas_kernels.hopper.simt import Words

BINS = 2048


class Cut(NamedTuple):
    """What divides the largest numbers from the rest.

    Attributes:
        above: numbers at or above this win.
        quota: so many of those that equal `above - 1` win too.
        winners: how many that makes.
    """

    above: Any
    quota: Any
    winners: Any


class Workspace(NamedTuple):
    """Shared memory of `find_cut`; the bins hold 0 before and after."""

    bins: Words  # BINS + 4
    totals: Words  # 32 words
    found: Words  # 4 words


def clear(block: Any, workspace: Workspace) -> None:
    """Sets the bins to 0, once at the start; a barrier must follow before `find_cut`."""
    for i in range(0, BINS, 4 * block.threads):
        block.store4(workspace.bins, block.thread * 4 + i, [block.constant(0)] * 4)


def stride(threads: int) -> int:
    """Numbers that the lanes of a block take at a time."""
    return 8 * threads


def round_up(count: int, threads: int) -> int:
    """The least multiple of the stride that holds so many numbers."""
    return -(-count // stride(threads)) * stride(threads)


def find_cut(
    block: Any, workspace: Workspace, numbers: Words, count: Any, k: Any, spare: int = 0
) -> Cut:
    """Finds where the k largest of the first `count` numbers end.

    A pass counts how many numbers fall into each of 2048 bins of equal width, walks the bins from
    the top to the one in which the k-th lies, and the next pass divides that bin. The bins are 2^22
    wide at first (1024 of them serve), then 2^11, then 1. It ends earlier where a bin may win
    whole, which is why distinct numbers rarely need the third pass.

    Numbers of value 0 are padding: none may be among the k largest, nor any number below 2^22 but
    0, or from 2^32 - 2^22 on. From `count` up to a multiple of `stride` the numbers become 0. The
    lanes' earlier writes to `numbers` need no barrier.

    Args:
        block: the lanes; their number divides `BINS / 4`.
        workspace: scratch.
        numbers: in shared memory; their size is a multiple of `stride`.
        count: how many numbers there are.
        k: at least 1.
        spare: so many more than k may win if that is found sooner.
    """
    step = stride(block.threads)
    end = (count + (step - 1)) & (2**32 - step)
    for i in range(0, step, block.threads):
        place = count + block.thread + i
        block.store(numbers, place, 0, where=place < end)
    block.barrier()

    def narrow(state):
        low, shift, wanted, _ = state
        _count(block, workspace.bins, numbers, end, low, shift)
        block.barrier()
        bin_, above, inside = _walk(block, workspace, wanted)
        low, wanted = low + (bin_ << shift), wanted - above
        extra = inside - wanted
        whole = extra <= spare
        done = whole | (shift == 0)
        next_shift = block.select(shift == 22, 11, 0)
        # The last bins are 1 wide: `low` is the k-th number itself, and may win only in part.
        partial = ~whole & done
        low = block.select(partial, low + 1, low)
        quota = block.select(whole, 0, wanted)
        return ~done, (low, next_shift, quota, block.select(whole, extra, 0))

    zero = block.constant(0)
    start = (zero, block.constant(22), zero + k, zero)
    above, _, quota, extra = block.repeat(start, narrow)
    return Cut(above, quota, extra + k)


def _count(block, bins, numbers, end, low, shift):
    """Adds the numbers of `[low, low + 2048 * 2^shift)` to their bins."""

    def step(i, carry):
        at = i + block.thread * 4
        some = block.load4(numbers, at) + block.load4(numbers, at + 4 * block.threads)
        numbered = [(number - low) >> shift for number in some]
        lowest = numbered[0]
        for bin_ in numbered[1:]:
            lowest = block.minimum(lowest, bin_)

        def add(_):
            # The others go to a bin of their own, which nobody reads: cheaper than a branch each.
            for bin_ in numbered:
                block.increment(bins, block.minimum(bin_, BINS))
            return ()

        block.when(block.any(lowest < BINS), add)
        return carry

    block.loop(0, end, stride(block.threads), (), step)


def _walk(block, workspace, wanted):
    """The bin that holds the wanted-th largest number, how many lie above it and in it.

    Sets the bins back to 0.
    """
    bins, totals, found = workspace
    each = BINS // block.threads
    first = BINS - each - block.thread * each  # lane 0 has the highest bins
    counts = []
    for i in range(0, each, 4):
        counts += block.load4(bins, first + i)
        block.store4(bins, first + i, [block.constant(0)] * 4)
    mine = counts[0]
    for count in counts[1:]:
        mine = mine + count
    before, _ = scan_block(block, totals, mine)

    def report(_):
        above = before
        for i in reversed(range(each)):
            here = (above < wanted) & (wanted <= above + counts[i])
            for slot, value in enumerate((first + i, above, counts[i])):
                block.store(found, slot, value, where=here)
            above = above + counts[i]
        return ()

    block.when(block.any((before < wanted) & (wanted <= before + mine)), report)
    block.barrier()
    bin_, above, inside, _ = block.load4(found, 0)
    return bin_, above, inside
