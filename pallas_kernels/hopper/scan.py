"""Sums over the lanes of a CTA, in lane order."""

from __future__ import annotations

from typing import Any

from pallas_kernels.hopper.simt import WARP, Words


def share_warp_totals(block: Any, totals: Words, mine: Any, turn: Any = 0) -> tuple[Any, Any]:
    """Sums of a number that each warp has: of the warps before one's own, and of all.

    There is one barrier inside: what lanes wrote before it, all may read after. The totals may be
    written again once all lanes have passed another barrier, so a caller without one takes turns.

    Args:
        block: the lanes.
        totals: 32 words a turn.
        mine: the same in all lanes of a warp.
        turn: which of the 32 words to use.

    Returns:
        The sum over the warps before, and over all warps.
    """
    block.store(totals, block.warp + turn * WARP, mine, where=block.lane == 0)
    block.barrier()
    # Lane i looks at warp i. The words past the last warp hold garbage.
    theirs = block.select(block.lane < block.warps, block.load(totals, block.lane + turn * WARP), 0)
    before = block.total(block.select(block.lane < block.warp, theirs, 0))
    return before, block.total(theirs)


def scan_block(block: Any, totals: Words, x: Any, turn: Any = 0) -> tuple[Any, Any]:
    """Exclusive sums over the lanes of a CTA, and their total; the rest as above."""
    inclusive = block.scan(x)
    before, total = share_warp_totals(block, totals, block.shuffle(inclusive, WARP - 1), turn)
    return before + inclusive - x, total
