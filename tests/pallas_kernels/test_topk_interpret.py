"""The top-k kernel's program on the CPU, lane by lane, with race detection (ring 1).

`topk_sm90.simulate` runs the very program that the kernel emits; only the lanes are NumPy's.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from topk_rows import best, by_lax, hard_ranges, hard_rows

from pallas_kernels import KeyRange
from pallas_kernels.hopper import histogram, scan, simt_model
from pallas_kernels.hopper.simt import Words
from pallas_kernels.lightning_indexer import topk_plan, topk_row, topk_sm90

# Small enough that a row of some thousand scores fills, streams, compacts and emits.
SMALL = dict(threads=128, vectors=2, capacity=2048, sample=1024)


def check(scores, starts, ends, topk, **options):
    scores, starts, ends = np.float32(scores), np.int32(starts), np.int32(ends)
    options = SMALL | options
    got = topk_sm90.select_rows(scores, starts, ends, topk=topk, interpret=True, **options)
    np.testing.assert_array_equal(got, best(scores, starts, ends, topk))
    return got


def one_row(block, plan, *arrays):
    zero = block.constant(0)
    topk_row.select_row(block, plan, *arrays, zero, zero, 1)


@pytest.mark.parametrize("name", [name for name, _ in hard_rows(4)])
@pytest.mark.parametrize("width", [5121, 8192])
def test_hard_rows(name, width):
    row = dict(hard_rows(width))[name]
    starts, ends = hard_ranges(2, width)
    starts, ends = [0, *starts], [width, *ends]
    check([row] * 3, starts, ends, 700)


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes(seed):
    """Widths off every alignment, any k, ranges ragged; values with and without ties."""
    rng = np.random.default_rng(seed)
    width, topk = int(rng.integers(1, 9000)), int(rng.integers(1, 1025))
    sizes = dict(
        threads=int(rng.choice([128, 256])), vectors=int(rng.integers(1, 3)),
        capacity=4096, sample=2048,
    )  # fmt: skip
    scores = rng.standard_normal((3, width)).astype(np.float32)
    scores = np.round(scores * 30) if seed % 2 else scores
    bounds = hard_ranges(3, width, seed)
    got = check(scores, *bounds, min(topk, width), **sizes)
    ranges = KeyRange(*(jnp.asarray(bound)[None] for bound in bounds))
    np.testing.assert_array_equal(got, by_lax(jnp.asarray(scores)[None], ranges, got.shape[1])[0])


@pytest.mark.parametrize("visible", [0, 1, 99, 100, 101, 104])
def test_few_visible(visible):
    """Up to K visible scores all are selected, NaN too; from K + 1 on there is a choice."""
    scores = np.random.default_rng(visible).standard_normal((1, 4099)).astype(np.float32)
    scores[:, ::3] = np.nan
    check(scores, [1777], [1777 + visible], 100)


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("name", ["normal", "all equal", "mostly NaN", "ascending"])
def test_segments(name, parts):
    """A row cut into segments; rows with few visible scores, and segments without any."""
    width = 6003
    row = dict(hard_rows(width))[name]
    starts = [0, 100, 100, 100, 3000, 6002, 9]
    ends = [width, 5000, 100 + 300, 100 + 301, 3003, width, 9]
    check([row] * 7, starts, ends, 300, parts=parts)


def test_nothing_outside_the_range_counts():
    scores = np.full((2, 4098), np.inf, np.float32)
    scores[0, 130:4001] = np.nan
    scores[1, 131:4002] = -np.inf
    check(scores, [130, 131], [4001, 4002], 64)


@pytest.mark.parametrize("name", ["ascending", "normal", "winners last"])
def test_a_buffer_with_no_room_to_spare(name):
    """K and a tile fill the buffer to 24 entries."""
    row = dict(hard_rows(8000))[name]
    check([row], [0], [8000], 1000)


def test_the_end_of_the_last_tile():
    """Scores past the range in the last vector of a tile that the range almost fills."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((6, 5124)).astype(np.float32)
    tile_end = SMALL["capacity"] + 3 * 1024
    ends = tile_end + np.arange(-4, 2)
    scores[np.arange(5124) >= ends[:, None]] = np.inf
    check(scores, [0] * 6, ends, 100)


class Counting(simt_model.ModelBlock):
    """Counts how often each vector of a row is read."""

    def __init__(self, plan):
        super().__init__(plan.threads, plan.words)
        self.reads = np.zeros(plan.width // 4 + 1, int)

    def load4_global(self, row, i):
        np.add.at(self.reads, i, 1)
        return super().load4_global(row, i)


def run_counting(scores, start, end, topk):
    plan = topk_plan.Plan(topk, len(scores), **SMALL)
    block, out = Counting(plan), np.zeros(topk, np.int32)
    one_row(block, plan, scores, np.int32([start]), np.int32([end]), out)
    np.testing.assert_array_equal(out, best(scores[None], [start], [end], topk)[0])
    return block.reads


@pytest.mark.parametrize("name", ["normal", "ascending", "descending", "relu plateau", "all equal"])
def test_scores_are_read_once(name):
    """Beside the sample; and the last vector, which stands in for those past it."""
    start, end = 17, 8995
    reads = run_counting(dict(hard_rows(9000))[name], start, end, 200)
    first, last = start // 4, (end - 1) // 4
    assert reads[:first].sum() == reads[last + 1 :].sum() == 0
    assert (reads[first:last] >= 1).all()
    assert (reads[first:last] - 1).sum() == SMALL["sample"] // 4


def mislead(scores):
    """Raises the very scores that are sampled: the guess is then one that few others reach."""
    plan = topk_plan.Plan(1, len(scores), **SMALL)
    slots = np.arange(plan.sample // 4, dtype=np.uint32)
    vectors = topk_plan.sampled_vector(slots, np.uint32(len(scores) // 4), plan)
    assert len(set(vectors)) == len(slots)
    assert vectors.min() >= 1
    assert vectors.max() < len(scores) // 4 - 1
    scores = scores.copy()
    scores.reshape(-1, 4)[vectors] += np.float32(9)
    return scores


@pytest.mark.parametrize("name", ["normal", "ascending", "some inf", "mostly NaN", "all equal"])
@pytest.mark.parametrize("topk", [1000, 4])
def test_a_misleading_sample(name, topk):
    scores = mislead(dict(hard_rows(9000))[name])
    check([scores] * 3, [0, 0, 6], [9000, 8997, 9000], topk)


def test_a_misled_row_is_streamed_again():
    """Once, behind a guess from other places."""
    scores = mislead(np.random.default_rng(0).standard_normal(9000).astype(np.float32))
    reads = run_counting(scores, 0, 9000, 1000)[:2249]  # the last is read for those past it
    assert (reads >= 2).all()
    assert (reads - 2).sum() == 2 * SMALL["sample"] // 4


@pytest.mark.parametrize("name", ["normal", "ascending", "mostly NaN", "all equal"])
def test_two_misleading_samples(name, monkeypatch):
    """Without a guess in the end; the second sample is made to be at the places of the first."""

    def unsalted(slot, vectors, plan, salt):
        return topk_plan.sampled_vector(slot, vectors, plan)

    monkeypatch.setattr(topk_row, "sampled_vector", unsalted)
    scores = mislead(dict(hard_rows(9000))[name])
    check([scores] * 2, [0, 6], [9000, 9000], 1000)
    if name == "normal":
        reads = run_counting(scores, 0, 9000, 1000)[:2249]  # the last is read for those past it
        assert (reads >= 3).all()
        assert (reads - 3).sum() == 2 * SMALL["sample"] // 4


def test_a_missing_barrier_is_found():
    class Hasty(simt_model.ModelBlock):
        def barrier(self):
            if self.barriers != 3:
                super().barrier()
            else:
                self.barriers += 1

    plan = topk_plan.Plan(200, 5000, **SMALL)
    scores = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    bounds = np.array([0], np.int32), np.array([5000], np.int32)
    block = Hasty(plan.threads, plan.words)
    with pytest.raises(simt_model.RaceError):
        one_row(block, plan, scores, *bounds, np.zeros(200, np.int32))


def test_scan_block():
    block = simt_model.ModelBlock(256, 64)
    x = np.random.default_rng(0).integers(0, 1000, 256).astype(np.uint32)
    before, total = scan.scan_block(block, Words(0, 64), x, turn=1)
    np.testing.assert_array_equal(before, np.cumsum(x) - x)
    np.testing.assert_array_equal(total, x.sum())


@pytest.mark.parametrize("spread", [1, 300, 2**20, 2**31])
def test_find_cut(spread):
    """Against a sort, and with the bins clean again afterwards."""
    rng = np.random.default_rng(spread)
    for count, k in [(1, 1), (777, 1), (777, 776), (777, 777), (2001, 1000)]:
        block = simt_model.ModelBlock(128, 8192)
        workspace = histogram.Workspace(Words(4096, 2052), Words(6160, 64), Words(6400, 4))
        numbers = (2**22 + rng.integers(0, spread, count)).astype(np.uint32)
        block.memory[:count] = numbers
        histogram.clear(block, workspace)
        block.barrier()
        cut = histogram.find_cut(block, workspace, Words(0, 4096), count, k)
        assert int(cut.winners[0]) == k
        above, quota = int(cut.above[0]), int(cut.quota[0])
        kth = np.sort(numbers)[-k]
        assert (numbers >= above).sum() + quota == k
        assert quota <= (numbers == above - 1).sum()
        assert above <= kth + 1
        assert above == kth + 1 or quota == 0
        block.barrier()
        assert not block.memory[4096:6144].any()


def test_plans():
    with pytest.raises(ValueError, match="capacity=4096 must hold topk=4096"):
        topk_plan.Plan(4096, 100_000, capacity=4096)
    with pytest.raises(ValueError, match="threads=1024"):
        topk_plan.Plan(16, 100_000, threads=1024)
    for topk, width, tasks in itertools.product(
        [1, 2048, 4096], [4097, 16383, 16384, 262144], [1, 999]
    ):
        parts = topk_sm90.segments(tasks, topk, width)
        plans = [topk_sm90.plan(topk, width, tasks * parts)]
        plans += [topk_sm90.merge_plan(topk, width, parts)] if parts > 1 else []
        for plan in plans:
            assert 4 * plan.words <= 232448 - 1024
            assert plan.capacity % (8 * plan.threads) == 0
