"""`simt.SimtBlock` in NumPy: a CTA's program on the CPU, with race detection.

All lanes of a CTA advance together, one operation at a time. So a missing barrier does not change
a result here; it is found by bookkeeping instead: between two barriers, a word of shared memory
that one warp writes must not be touched by another warp (atomic additions may meet each other).
Conditions and bounds that must agree between lanes are checked.
"""

# ruff: noqa: D102  (what an operation means is said at `SimtBlock`)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.hopper.simt import WARP, GlobalRow, Place, Words

_NOBODY, _SEVERAL = -1, -2


class RaceError(AssertionError):
    """Two warps touched a word of shared memory without a barrier between them."""


class ModelBlock:
    """Runs the operations of a CTA's lanes; see `simt.SimtBlock` for what each means.

    Args:
        threads: of the CTA.
        words: 32-bit words of its shared memory; they hold garbage at first.
    """

    def __init__(self, threads: int, words: int):
        self.threads, self.warps = threads, threads // WARP
        self.thread = np.arange(threads, dtype=np.uint32)
        self.lane, self.warp = self.thread % WARP, self.thread // WARP
        self.memory = np.random.default_rng(0).integers(0, 2**32, words, dtype=np.uint32)
        self.barriers = 0
        self._active = np.ones(threads, bool)
        self._writer, self._reader, self._adder = (np.full(words, _NOBODY) for _ in range(3))

    # Lanes.

    def constant(self, value):
        return np.full(self.threads, value, np.uint32)

    def select(self, condition, yes, no):
        return np.where(condition, np.uint32(yes), np.uint32(no))

    def add_where(self, condition, x, amount):
        return np.where(condition, x + np.uint32(amount), x)

    def sign(self, x):
        return self.constant(0) - (x >> 31)

    def minimum(self, a, b):
        return np.minimum(a, np.uint32(b))

    def maximum(self, a, b):
        return np.maximum(a, np.uint32(b))

    def at_least(self, x, limit):
        return x.view(np.float32) >= limit.view(np.float32)

    def without_negative_zero(self, x):
        with np.errstate(invalid="ignore"):  # signalling NaN
            return (x.view(np.float32) + np.float32(0)).view(np.uint32)

    def low_bf16(self, x):
        return x << 16

    def high_bf16(self, x):
        return x & np.uint32(0xFFFF0000)

    def add_floats(self, x, y):
        with np.errstate(invalid="ignore"):
            return (x.view(np.float32) + y.view(np.float32)).view(np.uint32)

    # Warps.

    def shuffle(self, x, lane):
        self._whole_warps()
        lanes = np.broadcast_to(lane, (self.threads,)).reshape(-1, WARP).astype(np.int64)
        return np.take_along_axis(x.reshape(-1, WARP), lanes, axis=1).ravel()

    def scan(self, x):
        self._whole_warps()
        return x.reshape(-1, WARP).cumsum(axis=1, dtype=np.uint32).ravel()

    def total(self, x):
        self._whole_warps()
        return np.repeat(x.reshape(-1, WARP).sum(axis=1, dtype=np.uint32), WARP)

    def any(self, condition):
        self._whole_warps()
        return np.repeat(condition.reshape(-1, WARP).any(axis=1), WARP)

    def ballot(self, condition):
        self._whole_warps()
        bits = condition.reshape(-1, WARP).astype(np.uint32) << np.arange(WARP, dtype=np.uint32)
        return np.repeat(bits.sum(axis=1, dtype=np.uint32), WARP)

    # Shared memory.

    def load(self, array, i):
        return self._read(array, i + self.constant(0))

    def load4(self, array, i):
        i = i + self.constant(0)
        assert not (i[self._active] % 4).any(), "vector access off its alignment"
        return [self._read(array, i + n) for n in range(4)]

    def store(self, array, i, value, where=None):
        at, lanes = self._locate(array, i + self.constant(0), where)
        self._check(at, lanes, self._writer, self._reader, self._adder)
        self._mark(self._writer, at, lanes)
        self.memory[at] = (value + self.constant(0))[lanes]

    def store4(self, array, i, values):
        assert not ((i + self.constant(0))[self._active] % 4).any(), "vector off its alignment"
        for n, value in enumerate(values):
            self.store(array, i + n, value)

    def increment(self, array, i, where=None):
        at, lanes = self._locate(array, i + self.constant(0), where)
        self._check(at, lanes, self._writer, self._reader)
        self._mark(self._adder, at, lanes)
        np.add.at(self.memory, at, np.uint32(1))

    def _read(self, array: Words, i):
        at, lanes = self._locate(array, i, None)
        self._check(at, lanes, self._writer, self._adder)
        self._mark(self._reader, at, lanes)
        value = self.constant(0xDEADBEEF)
        value[lanes] = self.memory[at]
        return value

    def _locate(self, array: Words, i, where):
        lanes = np.flatnonzero(self._active if where is None else self._active & where)
        assert (i[lanes] < array.size).all(), f"beyond {array}: {i[lanes].max()}"
        return array.start + i[lanes].astype(np.int64), lanes

    def _check(self, at, lanes, *others):
        for other in others:
            if ((other[at] != _NOBODY) & (other[at] != self.warp[lanes])).any():
                raise RaceError(f"after barrier {self.barriers}: words {np.unique(at)[:8]}...")

    def _mark(self, who, at, lanes):
        warp = self.warp[lanes].astype(who.dtype)
        who[at] = np.where((who[at] == _NOBODY) | (who[at] == warp), warp, _SEVERAL)
        clash = who[at] != warp  # two warps in this very operation, or one of them before
        who[at[clash]] = _SEVERAL
        if who is self._writer and clash.any():
            raise RaceError(f"after barrier {self.barriers}: {np.unique(at[clash])[:8]} twice")

    # Device memory: an array is a flat NumPy array of 32-bit words.

    def global_row(self, array, row, width):
        start = int(_one(row)) * width
        return GlobalRow((array, start - start % 4), self.constant(start % 4))

    def load4_global(self, row, i):
        array, base = row.base
        at = base + 4 * np.where(self._active, i, 0).astype(np.int64)
        # A 16-byte access may pass the array's end, never the allocation's.
        padded = np.pad(array.view(np.uint32), (0, -len(array) % 4), constant_values=0x7FC12345)
        return [padded[at + n] for n in range(4)]

    def prefetch(self, row, i, count):
        array, base = row.base
        last = base + 4 * (_one(i) + _one(count))
        assert not _one(count) or last <= len(array) + -len(array) % 4, "beyond the array"

    def load_global(self, row, i):
        array, base = row.base
        at = base + np.where(self._active, i + row.skew, 0).astype(np.int64)
        return array.view(np.uint32)[at]

    def store_global(self, row, i, value, where=None):
        array, base = row.base
        lanes = self._active if where is None else self._active & where
        array.view(np.uint32)[base + (i + row.skew)[lanes].astype(np.int64)] = value[lanes]

    def place(self, array, width, offset):
        return Place((array, offset + self.constant(0)), width)

    def load_at(self, place, row, count=1, apart=1, passing=False):
        del passing
        array, at = self._words_at(place, row)
        found = [self.constant(0xDEADBEEF) for _ in range(count)]
        for n, word in enumerate(found):
            word[self._active] = array.view(np.uint32)[at + n * apart]
        return found

    def add_at(self, place, row, pairs, apart=1):
        array, at = self._words_at(place, row)
        assert not (at % 2).any(), "vector access off its alignment"
        for n, pair in enumerate(pairs):
            for i, value in enumerate(pair):
                added = value[self._active].view(np.float32)
                np.add.at(array.view(np.float32), at + n * apart + i, added)

    def _words_at(self, place, row):
        array, offset = place.start
        return array, (row.astype(np.int64) * place.width + offset)[self._active]

    # Control.

    def barrier(self):
        assert self._active.all(), "a barrier that not all lanes reach"
        self.barriers += 1
        for who in (self._writer, self._reader, self._adder):
            who[:] = _NOBODY

    def loop(self, start, end, step, carry, body: Callable) -> Any:
        for i in range(_one(start), _one(end), _one(step)):
            carry = body(self.constant(i), carry)
        return carry

    def repeat(self, carry, body: Callable) -> Any:
        again = True
        while again:
            again, carry = body(carry)
            again = _one(again)
        return carry

    def when(self, condition, body: Callable, carry=()) -> Any:
        held = condition.reshape(-1, WARP)
        assert (held.all(axis=1) == held.any(axis=1)).all(), "a branch that divides a warp"
        if held.all():
            return body(carry)
        if not held.any():
            return carry
        assert carry == (), "a branch with results that divides the CTA"
        outside, self._active = self._active, self._active & condition
        body(carry)
        self._active = outside
        return carry

    def _whole_warps(self):
        active = self._active.reshape(-1, WARP)
        assert (active.all(axis=1) == active.any(axis=1)).all(), "a divided warp"


def _one(x):
    """The value that all lanes have."""
    x = np.asarray(x)
    assert (x == x.flat[0]).all(), "lanes disagree on a bound or a condition of the whole CTA"
    return x.flat[0].item()
