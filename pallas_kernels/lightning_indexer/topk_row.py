"""What the lanes of a CTA do to select the k best scores of a row: one pass behind a threshold.

A row that fits the buffer goes through `fill` and `emit`; a longer one through

    guess     a sample of the row gives a threshold that somewhat more than k scores should reach;
    stream    of every tile of scores those that reach the threshold are appended to a buffer of
              (key, column), keys being uint32 that sort as the scores must;
    compact   when they do not fit, the k best of the buffer and perhaps some more are kept, and
              the threshold rises above what was dropped;
    emit      at the end, the k best of the buffer are the answer.

Should fewer than k reach the guess, the row is sampled and streamed once more, and should fewer
than k reach the second guess too, it is streamed without one: the first scores fill the buffer, NaN
and all, and the threshold rises from there.

The buffer is always in the order of the columns: appends and compactions number their elements by
prefix sums, never by the order in which lanes arrive. So the k best, ties to the lower column, are
the keys above the cut and the first so many on it; after a compaction a later score that only
equals the k-th cannot win; the output ascends by itself; and every run gives the same bits.

The guess decides how long a row takes, never what is selected. The sample is 64-byte pieces at
random but fixed places, one from each of equal parts of the row, so neither order nor period of the
scores misleads it. It is aimed five standard deviations low: of rows of independent scores less
than one in a million is streamed twice. The places of the second sample follow from what the first
stream found, so that no fixed set of places misleads both.
"""

from __future__ import annotations

import functools
from typing import Any

from pallas_kernels.hopper import compaction, histogram
from pallas_kernels.hopper.scan import scan_block, share_warp_totals
from pallas_kernels.hopper.simt import WARP
from pallas_kernels.lightning_indexer.topk_plan import Plan, sampled_vector

_NEGATIVE_INFINITY = 0x007FFFFF  # its key: of all numbers' the lowest
_NAN = _NEGATIVE_INFINITY - 1
_NAN_BITS = 0x7FC00000
_LOADS = 4  # loads of a lane under way at once when a buffer is filled; more take registers
_NOTHING = 0xFFFFFFFF  # -1 in the result
_GUESSES = 2


def select_row(
    block: Any, plan: Plan, scores, starts, ends, out, row: Any, segment: Any, segments: int
) -> None:
    """Selects of one segment of a row's range; the range is cut into equal segments.

    Args:
        block: what its lanes can do.
        plan: the sizes.
        scores, starts, ends: in device memory, `[rows, S]`, `[rows]`, `[rows]`.
        out: `[rows, segments, K]`; columns ascending, -1 at the end.
        row: which row.
        segment: which segment of it.
        segments: how many there are.
    """
    scores_row = block.global_row(scores, row, plan.width)
    out_row = block.global_row(out, row * segments + segment, plan.topk)
    zero = block.constant(0)
    start = _clip(block, block.load_global(block.global_row(starts, zero, 0), row), plan.width)
    end = _clip(block, block.load_global(block.global_row(ends, zero, 0), row), plan.width)
    if segments > 1:
        length = block.select(start < end, end - start, 0)
        each = (length + (segments - 1)) // segments
        start = start + segment * each
        end = block.minimum(start + each, end)
    visible = block.select(start < end, end - start, 0)

    def all_visible(_):
        def slots(i, _):
            slot = i + block.thread
            value = block.select(slot < visible, start + slot, _NOTHING)
            block.store_global(out_row, slot, value, where=slot < plan.topk)
            return ()

        block.loop(0, plan.topk, block.threads, (), slots)
        return ()

    def best(_):
        _Row(block, plan, scores_row, out_row, start, end).select()
        return ()

    block.when(visible <= plan.topk, all_visible)
    block.when(visible > plan.topk, best)


def merge_row(block: Any, plan: Plan, scores, lists, out, row: Any, segments: int) -> None:
    """Selects of what `select_row` found in a row's segments; `plan.capacity` holds it all.

    Args:
        block: what its lanes can do.
        plan: the sizes.
        scores: `[rows, S]`.
        lists: `[rows, segments, K]`.
        out: `[rows, K]`; columns ascending, -1 at the end.
        row: which row.
        segments: how many there are.
    """
    length = segments * plan.topk
    out_row = block.global_row(out, row, plan.topk)
    zero = block.constant(0)
    merging = _Row(block, plan, block.global_row(scores, row, plan.width), out_row, zero, zero)
    merging.merge(block.global_row(lists, row, length), length)


def _clip(block, position, width):
    """A signed position, moved into [0, width]."""
    return block.select(position < 1 << 31, block.minimum(position, width), 0)


class _Row:
    """A row's buffer, and what happens to it.

    A score's *place* counts from the 16-byte boundary at or before the row: its column plus the
    row's skew. A vector is four places from a multiple of 4.
    """

    def __init__(self, block: Any, plan: Plan, scores, out, start, end):
        self.block, self.plan, self.scores, self.out = block, plan, scores, out
        self.start, self.end = start + scores.skew, end + scores.skew
        self.first_vector, self.end_vector = self.start >> 2, (self.end + 3) >> 2
        arrays = plan.arrays
        self.keys, self.columns = arrays["keys"], arrays["columns"]
        self.totals, self.cut_totals = arrays["stream_totals"], arrays["cut_totals"]
        self.workspace = histogram.Workspace(arrays["bins"], self.cut_totals, arrays["found"])

    def select(self):
        """The answer, of more than K visible scores."""
        block, plan = self.block, self.plan
        histogram.clear(block, self.workspace)
        if plan.whole_row:
            self.fill(())
            count = block.constant(plan.capacity)
        else:
            count = self.stream_row()
        cut = histogram.find_cut(block, self.workspace, self.keys, count, plan.topk)
        self.emit(cut, count)

    def stream_row(self):
        """A buffer with the K best of a row that may be longer; its count."""
        block, plan = self.block, self.plan
        fits = self.end_vector - self.first_vector <= plan.capacity // 4
        lowest = block.constant(_NEGATIVE_INFINITY)

        def attempt(state):
            guesses, salt, _ = state
            block.barrier()  # the buffer and its totals may be in use still
            threshold = block.when(guesses > 0, functools.partial(self.guess, salt), lowest)
            block.when(guesses == 0, self.fill)
            taken = block.select(guesses == 0, plan.capacity // 4, 0)
            count = self.stream(self.first_vector + taken, taken * 4, threshold)
            return count < plan.topk, (guesses - 1, threshold + count, count)

        guesses = block.select(fits, 0, _GUESSES)
        zero = block.constant(0)
        return block.repeat((guesses, zero, zero), attempt)[2]

    def prefetch(self, first, tiles: int):
        """Keeps the memory busy while the lanes are not loading: tiles from a vector on."""
        first = self.block.minimum(first, self.end_vector)
        count = self.block.minimum(self.end_vector - first, tiles * self.plan.tile // 4)
        self.block.prefetch(self.scores, first, count)

    def guess(self, salt, lowest):
        """A threshold that more than K scores should reach, from a sample of the row."""
        block, plan = self.block, self.plan
        vectors = self.end_vector - self.first_vector
        slots = [block.thread + i for i in range(0, plan.sample // 4, plan.threads)]
        places = [self.first_vector + sampled_vector(slot, vectors, plan, salt) for slot in slots]
        scores = [self.load(place) for place in places]
        self.prefetch(self.first_vector, plan.ahead)  # behind the sample, which is waited for
        for slot, vector in zip(slots, scores, strict=True):
            block.store4(self.keys, slot * 4, [ordered(block, x) for x in vector])
        expected = block.constant(plan.topk * plan.sample) // (self.end - self.start)
        # Of the K best so many lie in the sample on average; some five standard deviations more.
        enough = expected + (expected >> 2) + 28
        count = block.constant(plan.sample)
        cut = histogram.find_cut(block, self.workspace, self.keys, count, enough, spare=8)
        block.barrier()  # the sample has been read
        # Below -inf only NaN is left, which no threshold lets pass.
        return block.maximum(block.select(cut.quota == 0, cut.above, cut.above - 1), lowest)

    def merge(self, lists, length):
        """The answer, of the scores of the columns in a list in which -1 is nothing."""
        block, plan = self.block, self.plan
        histogram.clear(block, self.workspace)
        slots = [block.thread + i for i in range(0, plan.capacity, plan.threads)]
        columns = [block.load_global(lists, block.minimum(slot, length - 1)) for slot in slots]
        listed = [
            (slot < length) & (column != _NOTHING)
            for slot, column in zip(slots, columns, strict=True)
        ]
        scores = [
            block.load_global(self.scores, block.select(there, column, 0))
            for there, column in zip(listed, columns, strict=True)
        ]
        mine = block.constant(0)
        for slot, column, there, x in zip(slots, columns, listed, scores, strict=True):
            block.store(self.keys, slot, block.select(there, ordered(block, x), 0))
            block.store(self.columns, slot, column + self.scores.skew)
            mine = block.add_where(there, mine, 1)
        _, found = scan_block(block, self.totals, mine)
        count = block.constant(plan.capacity)

        def all_found(_):
            everything = histogram.Cut(block.constant(1), block.constant(0), found)
            self.keep(everything, count, self.stage, compaction.keep_above)
            self.copy_out(found)

            def nothing(i, _):
                slot = i + block.thread
                missing = (slot >= found) & (slot < plan.topk)
                block.store_global(self.out, slot, block.constant(_NOTHING), where=missing)
                return ()

            block.loop(0, plan.topk, block.threads, (), nothing)
            return ()

        def best(_):
            cut = histogram.find_cut(block, self.workspace, self.keys, count, plan.topk)
            self.emit(cut, count)
            return ()

        block.when(found <= plan.topk, all_found)
        block.when(found > plan.topk, best)

    def fill(self, _):
        """The first `capacity` places from the range's first vector on, with keys.

        Places outside the range get key 0, which never wins: at most three of them lie before the
        range, and those after it are there only if the row ends here, with more than K visible.
        """
        block, threads = self.block, self.plan.threads
        rounds = self.plan.capacity // (4 * threads)
        batch = max(n for n in range(1, _LOADS + 1) if rounds % n == 0)

        def some(first, carry):
            slots = [first + block.thread + threads * i for i in range(batch)]
            loaded = [self.load(self.first_vector + slot) for slot in slots]
            for slot, vector in zip(slots, loaded, strict=True):
                self.put(slot * 4, vector)
            return carry

        block.loop(0, threads * rounds, threads * batch, (), some)
        return ()

    def put(self, slot, vector):
        """Four scores into the buffer."""
        block = self.block
        places = [self.first_vector * 4 + slot + n for n in range(4)]
        ended = places[0] >= self.end
        block.store4(self.keys, slot, [block.select(ended, 0, ordered(block, x)) for x in vector])
        if not self.plan.whole_row:
            block.store4(self.columns, slot, places)
        across = (places[0] < self.start) | ((places[3] >= self.end) & ~ended)
        block.when(block.any(across), functools.partial(self.clear_outside, slot, places))

    def clear_outside(self, slot, places, _):
        """Takes the places outside the range out of a vector of the buffer."""
        for n, place in enumerate(places):
            outside = (place < self.start) | (place >= self.end)
            self.block.store(self.keys, slot + n, 0, where=outside)
        return ()

    def load(self, vector):
        """Four scores; of the range's last vector where it has ended."""
        return self.block.load4_global(self.scores, self.block.minimum(vector, self.end_vector - 1))

    def load_tile(self, first):
        """The lane's vectors of the tile that starts at a vector; a warp's lie side by side."""
        block, plan = self.block, self.plan
        mine = first + block.warp * (WARP * plan.vectors) + block.lane
        return [self.load(mine + WARP * j) for j in range(plan.vectors)]

    def stream(self, begin, count, threshold):
        """Appends what reaches the threshold, compacts when it must; the buffer's count.

        Args:
            begin: the vector to start at; those before are in the buffer.
            count: of the buffer.
            threshold: a key. What does not reach it cannot win, or the caller sees to that.
        """
        block, plan = self.block, self.plan
        step = plan.tile // 4

        def tile(first, state):
            count, threshold, turn, scores = state
            if plan.ahead:
                self.prefetch(first + plan.ahead * step, 1)
            following = self.load_tile(first + step)
            across = ((first + step) * 4 > self.end) | (first * 4 < self.start)
            scores = block.when(across, lambda scores: self.hide_outside(first, scores), scores)
            limit = unordered(block, threshold)
            counted = self.count(scores, limit, turn)

            def make_room(state):
                count = state[0]
                cut = histogram.find_cut(
                    block, self.workspace, self.keys, count, plan.topk, plan.spare
                )
                self.keep(cut, count, self.move)
                threshold = block.maximum(cut.above, state[1])
                limit = unordered(block, threshold)
                counted = self.count(scores, limit, turn)
                return cut.winners, threshold, limit, counted

            state = count, threshold, limit, counted
            full = count + counted[-1] > plan.capacity
            count, threshold, limit, counted = block.when(full, make_room, state)
            lanes_before, sums, warps_before, total = counted
            self.append(first, scores, limit, count + warps_before, lanes_before, sums)
            return count + total, threshold, turn ^ 1, following

        state = (count, threshold, block.constant(0), self.load_tile(begin))
        return block.loop(begin, self.end_vector, step, state, tile)[0]

    def hide_outside(self, first, tile):
        """Makes NaN, which passes no threshold, of the tile's scores outside the range."""
        block, plan = self.block, self.plan
        # Counted from the range's start; unsigned, so what lies before it is far past its end.
        place = (first + block.warp * (WARP * plan.vectors) + block.lane) * 4 - self.start
        length = self.end - self.start
        return [
            [
                block.select(place + (4 * WARP * j + n) < length, x, _NAN_BITS)
                for n, x in enumerate(vector)
            ]
            for j, vector in enumerate(tile)
        ]

    def count(self, tile, limit, turn):
        """Counts the scores that reach the limit.

        Returns:
            Of the lanes before one's own in the warp, and of the warp, by vector in 8 bits each; of
            the warps before one's own; of the CTA.
        """
        block = self.block
        found = block.constant(0)
        for j, vector in enumerate(tile):
            for x in vector:
                found = block.add_where(block.at_least(x, limit), found, 1 << (8 * j))
        inclusive = block.scan(found)  # a warp has at most 128 in a vector
        sums = block.shuffle(inclusive, WARP - 1)
        mine = sum((sums >> (8 * j)) & 0xFF for j in range(self.plan.vectors))
        return inclusive - found, sums, *share_warp_totals(block, self.totals, mine, turn)

    def append(self, first, tile, limit, position, before, sums):
        """Writes the scores that reach the limit into the buffer: by vector, lane and element."""
        block, plan = self.block, self.plan
        place = (first + block.warp * (WARP * plan.vectors) + block.lane) * 4

        def write(_):
            start = position
            for j, vector in enumerate(tile):
                slot = start + ((before >> (8 * j)) & 0xFF)
                for n, x in enumerate(vector):
                    passes = block.at_least(x, limit)
                    block.store(self.keys, slot, ordered_number(block, x), where=passes)
                    block.store(self.columns, slot, place + (4 * WARP * j + n), where=passes)
                    slot = block.add_where(passes, slot, 1)
                start = start + ((sums >> (8 * j)) & 0xFF)
            return ()

        block.when(sums != 0, write)

    def keep(self, cut, count, sink, keep=compaction.keep):
        """Hands the buffer's winners to a sink, in order."""
        arguments = self.cut_totals, self.keys, self.load_columns, cut, count, sink
        keep(self.block, *arguments)

    def load_columns(self, at):
        """The places of four buffer entries."""
        if self.plan.whole_row:
            return [self.first_vector * 4 + at + n for n in range(4)]
        return self.block.load4(self.columns, at)

    def move(self, slot, key, column, where):
        """A sink: the front of the buffer."""
        self.block.store(self.keys, slot, key, where=where)
        self.block.store(self.columns, slot, column, where=where)

    def stage(self, slot, key, column, where):
        """A sink: the front of the keys, which nobody needs any more, becomes the row's result."""
        del key
        self.block.store(self.keys, slot, column - self.scores.skew, where=where)

    def emit(self, cut, count):
        """Writes the winners to the row of the result."""
        self.keep(cut, count, self.stage)
        self.copy_out(self.plan.topk)

    def copy_out(self, length):
        """Writes what is staged; lanes that follow each other write words that do."""
        block = self.block
        block.barrier()

        def slots(i, carry):
            slot = i + block.thread
            column = block.load(self.keys, slot)
            block.store_global(self.out, slot, column, where=slot < length)
            return carry

        block.loop(0, length, block.threads, (), slots)


def ordered_number(block, x):
    """The key of a float that is not NaN: uint32 that sort as the floats do, -0.0 equal to 0.0."""
    x = block.without_negative_zero(x)
    return x ^ (block.sign(x) | 1 << 31)


def ordered(block, x):
    """The key of a float; NaN below all numbers."""
    return block.select(block.at_least(x, x), ordered_number(block, x), _NAN)


def unordered(block, key):
    """The float of a key; the key above infinity's gives NaN."""
    return key ^ block.select(key >= 1 << 31, 1 << 31, 0xFFFFFFFF)
