"""The sizes of the top-k kernel, its shared memory, and where it samples a row."""

from __future__ import annotations

import dataclasses

from pallas_kernels.hopper import histogram
from pallas_kernels.hopper.simt import WARP, Words

_PIECE = 4  # vectors that are sampled side by side: what DRAM delivers at once


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a kernel.

    Attributes:
        topk: K.
        width: S, words of a row.
        threads: lanes of a CTA, which takes one row.
        vectors: 16-byte loads of a lane in a tile; at most 4.
        capacity: of the buffer.
        sample: how many scores of a row the threshold is guessed from; a multiple of `8 * threads`.
        ahead: how many tiles before their turn scores are fetched into the L2.
    """

    topk: int
    width: int
    threads: int = 256
    vectors: int = 4
    capacity: int = 8192
    sample: int = 2048
    ahead: int = 4

    def __post_init__(self):
        if self.threads not in (128, 256, 512):
            raise ValueError(f"threads={self.threads} must be 128, 256 or 512")
        if not self.whole_row and self.capacity < self.topk + self.tile:
            raise ValueError(
                f"capacity={self.capacity} must hold topk={self.topk} scores and a tile of "
                f"{self.tile}, or a whole row of {self.width}"
            )
        if not self.whole_row and (self.sample % (8 * self.threads) or self.sample > self.capacity):
            raise ValueError(
                f"sample={self.sample} must be a multiple of {8 * self.threads} up to "
                f"capacity={self.capacity}"
            )

    @property
    def tile(self) -> int:
        """Scores of a tile."""
        return 4 * self.vectors * self.threads

    @property
    def places(self) -> int:
        """Words that a row can take from a 16-byte boundary to the next after it."""
        return self.width if self.width % 4 == 0 else self.width + 3

    @property
    def whole_row(self) -> bool:
        """Whether the buffer holds any row whole; an entry's place then follows from its slot."""
        return self.capacity >= self.places

    @property
    def spare(self) -> int:
        """How many more than K a compaction may keep; it must leave room for a tile."""
        return max(0, min(self.topk // 4, self.capacity - self.tile - self.topk))

    @property
    def arrays(self) -> dict[str, Words]:
        """The arrays in shared memory."""
        sizes = {"keys": self.capacity, "columns": 0 if self.whole_row else self.capacity}
        sizes |= {"bins": histogram.BINS + 4, "found": 4}
        sizes |= {"cut_totals": 2 * WARP, "stream_totals": 2 * WARP}
        arrays, start = {}, 0
        for name, size in sizes.items():
            arrays[name] = Words(start, size)
            start += -(-size // 4) * 4
        return arrays

    @property
    def words(self) -> int:
        """Shared memory, in words."""
        return sum(-(-array.size // 4) * 4 for array in self.arrays.values())


def sampled_vector(slot, vectors, plan: Plan, salt=0):
    """Which of a row's `vectors` the slot-th of a sample is: not the first, not the last.

    Equal parts of the row give a piece each, from a place in it that a hash of its number and of
    the salt picks.
    """
    pieces = plan.sample // (4 * _PIECE)
    piece, inner = slot // _PIECE, vectors - 2
    room = inner // pieces - (_PIECE - 1)
    random = (piece + 1) * 0x9E3779B1 ^ salt
    random = ((random ^ (random >> 15)) * 0x85EBCA77) >> 16
    return 1 + piece * inner // pieces + (random * room >> 16) + slot % _PIECE
