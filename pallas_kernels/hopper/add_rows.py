# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""Sums of listed rows by key, by a warpgroup that needs no shared memory and no tensor core.

    sums[keys[i]] += rows[pairs[i]]        for i = 0, 1, ...; keys in rising order

A warp takes one share of the columns and one range of the list, which begins and ends where a key
does. It keeps the sum of its key in registers and walks the list in order: so a key's rows are
added in the order in which they are listed, by one warp, and the bits of the result are always the
same. `depth` rows are on their way to registers at any time; what hides the memory's latency is
that all warps of the GPU together have megabytes on their way.

It is meant to run as one more warpgroup of a kernel that leaves the memory idle. Registers of a
thread: `depth` times the words of a row that a lane loads, twice as many sums, and about 20 more:
64 for shares of 192 columns and a depth of 12.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.simt import U32, WARP, SimtWarpgroup

WARPS = 4  # of a warpgroup
_NO_KEY = 2**32 - 1
_TOGETHER = 3  # rows that are added without a look between them, where no key ends


@dataclasses.dataclass(frozen=True)
class Adder:
    """The static numbers of a call.

    Attributes:
        rows: how many there are, in an array of at most 2**32 words.
        width: columns of a row and of a sum.
        share: those of a warp: 64, 128 or 192, a divisor of the width.
        ctas: how many CTAs have such a warpgroup.
        depth: rows of a share on their way, a multiple of 3 up to 30.
        interpret: whether this is the twin.
    """

    rows: int
    width: int
    share: int
    ctas: int
    depth: int
    interpret: bool

    @property
    def shares(self) -> int:
        """How many a row has."""
        return self.width // self.share

    @property
    def ranges(self) -> int:
        """Into how many the list is divided: as many as there are warps for all shares of each."""
        return max(1, WARPS * self.ctas // self.shares)

    @property
    def turns(self) -> int:
        """Ranges and shares that a warp takes, at most."""
        return -(-self.ranges * self.shares // (WARPS * self.ctas))

    def add(self, cta, rows, pairs, keys, bounds, sums) -> None:
        """Adds up this CTA's part of the list.

        Args:
            cta: this one's number below `ctas`.
            rows: GMEM bf16 `[shares, rows, share]`.
            pairs: GMEM i32 `[m]`, rows in the order in which they are added.
            keys: GMEM i32 `[m]`, the sums they are added to, rising.
            bounds: GMEM i32 `[ranges + 1]`, where in the list ranges begin and end; a bound is 0,
                the list's end, or a place whose key is not the one before.
            sums: GMEM f32 `[keys, width]`.
        """
        if self.interpret:
            self._twin(cta, rows, pairs, keys, bounds, sums)
            return
        refs = rows, pairs, keys, bounds, sums

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), plgpu.Layout.WG_SPLAT))
        def emit(_, *refs_and_cta):
            *refs, cta = refs_and_cta
            block = SimtWarpgroup()
            first = U32(cta.registers.item()) * WARPS + block.warp
            for turn in range(self.turns):
                walk(block, self, first + turn * WARPS * self.ctas, *refs)

        emit(*refs, cta)

    def _twin(self, cta, rows, pairs, keys, bounds, sums):
        """The same sums in the same order, in plain Pallas."""

        def add_range(start, end, share):
            columns = pl.ds(share * self.share, self.share)

            def step(i, carry):
                total, current = carry
                changes = keys[i] != current

                @pl.when(changes)
                def _():
                    sums[current, columns] = sums[current, columns] + total

                total = jnp.where(changes, 0.0, total)
                return total + rows[share, pairs[i], :].astype(jnp.float32), keys[i]

            zeros = jnp.zeros((self.share,), jnp.float32)
            total, current = lax.fori_loop(start, end, step, (zeros, keys[start]))
            sums[current, columns] = sums[current, columns] + total

        for turn in range(self.turns):
            for warp in range(WARPS):
                unit = (cta + turn * self.ctas) * WARPS + warp
                exists = unit < self.ranges * self.shares
                number = jnp.where(exists, lax.div(unit, jnp.int32(self.shares)), 0)
                for share in range(self.shares):
                    mine = exists & (lax.rem(unit, jnp.int32(self.shares)) == share)

                    @pl.when(mine & (bounds[number] < bounds[number + 1]))
                    def _(number=number, share=share):
                        add_range(bounds[number], bounds[number + 1], share)


def bounds_of_ranges(keys, parts):
    """Divides parts of a rising list into ranges of about the same length, at ends of keys.

    Args:
        keys: i32 `[m]`, rising.
        parts: `(start, end, ranges)` of each: both are moved to where the next key begins, unless
            one begins there.

    Returns:
        For each part i32 `[ranges + 1]`, for `Adder.add`.
    """

    def evenly(start, end, ranges):
        number = jnp.arange(ranges + 1, dtype=jnp.int32)
        inner = start + (number * ((end - start) / jnp.float32(ranges))).astype(jnp.int32)
        return jnp.where(number == ranges, end, jnp.minimum(inner, end))

    wanted = jnp.concatenate([evenly(*part) for part in parts])
    before = keys[jnp.clip(wanted - 1, 0, keys.shape[0] - 1)]
    found = jnp.searchsorted(keys, before, side="right", method="scan_unrolled")
    found = jnp.where(wanted > 0, found, 0).astype(jnp.int32)
    ends = np.cumsum([ranges + 1 for *_, ranges in parts])
    return jnp.split(found, ends[:-1])


class _Listed(NamedTuple):
    """A chunk of the list, an entry a lane."""

    pairs: Any
    keys: Any


def walk(block: Any, adder: Adder, unit: Any, rows, pairs, keys, bounds, sums) -> None:
    """One warp's share of the columns of one range of the list.

    Args:
        block: the lanes.
        adder: the static numbers.
        unit: range and share, as one number; none where it is too large.
        rows: as of `Adder.add`, as all that follow.
    """
    number, share = unit // adder.shares, unit % adder.shares
    limits = block.place(bounds, 1, 0)

    def run(_):
        [start], [end] = (block.load_at(limits, number + i) for i in range(2))
        block.when(
            start < end,
            lambda _: _walk_range(block, adder, share, start, end, rows, pairs, keys, sums),
        )
        return ()

    block.when(number < adder.ranges, run)


def _walk_range(block, adder: Adder, share, start, end, rows, pairs, keys, sums):
    depth, chunk = adder.depth, WARP // adder.depth * adder.depth
    listed = block.place(pairs, 1, 0), block.place(keys, 1, 0)
    # A word of each 64 columns is a lane's.
    words = adder.share // 64
    source = block.place(rows, 32 * words, share * (adder.rows * 32 * words) + block.lane)
    target = block.place(sums, adder.width, share * adder.share + 2 * block.lane)

    def look(position):
        """Each lane's pair and key; those past the end go nowhere."""
        at = position + block.lane
        inside = block.minimum(at, end - 1)
        [pair], [key] = (block.load_at(place, inside) for place in listed)
        return _Listed(pair, block.select(at < end, key, _NO_KEY))

    def load(row):
        return block.load_at(source, row, words, apart=WARP, passing=True)

    def store(totals, key):
        halves = list(zip(totals[::2], totals[1::2], strict=True))
        block.add_at(target, key, halves, apart=2 * WARP)
        return [block.constant(0)] * len(totals)

    def add(totals, row):
        halves = [half(word) for word in row for half in (block.low_bf16, block.high_bf16)]
        return [block.add_floats(x, y) for x, y in zip(totals, halves, strict=True)]

    def add_some(totals, some, ends, keys, i):
        """Adds rows from the chunk's i-th on; where a key ends, its sum is stored."""
        ends = (ends >> i) & ((1 << len(some)) - 1)

        def within(totals):
            for row in some:
                totals = add(totals, row)
            return totals

        def across(totals):
            for n, row in enumerate(some):
                totals = add(totals, row)
                key = block.shuffle(keys, i + n)
                totals = block.when(ends & (1 << n) != 0, lambda t, key=key: store(t, key), totals)
            return totals

        return block.when(ends != 0, across, block.when(ends == 0, within, totals))

    def step(here, after, ends, i, state):
        """Adds `depth` rows, and replaces each by the one that comes `depth` later."""
        totals, ring = state
        comes = i + depth
        wraps = comes == chunk
        coming, comes = block.select(wraps, after.pairs, here.pairs), block.select(wraps, 0, comes)
        filled = []
        for n in range(0, depth, _TOGETHER):
            following = [block.shuffle(coming, comes + n + m) for m in range(_TOGETHER)]
            totals = add_some(totals, ring[n : n + _TOGETHER], ends, here.keys, i + n)
            filled += [load(pair) for pair in following]
        return totals, filled

    def some(position, state):
        *state, here, after = state
        later = look(position + 2 * chunk)
        last = block.lane == chunk - 1
        following = block.select(
            last, block.shuffle(after.keys, 0), block.shuffle(here.keys, (block.lane + 1) & 31)
        )
        ends = block.ballot(here.keys != following)
        run = functools.partial(step, here, after, ends)
        return *block.loop(0, chunk, depth, tuple(state), run), after, later

    here, after = look(start), look(start + chunk)
    ring = [load(block.shuffle(here.pairs, n)) for n in range(depth)]
    zeros = [block.constant(0)] * (2 * words)
    block.loop(start, end, chunk, (zeros, ring, here, after), some)
    return ()
