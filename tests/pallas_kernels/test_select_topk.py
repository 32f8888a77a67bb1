"""The selection's rules: exact, ties to the lower index, NaN last, ascending, -1 at the end."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis.extra import numpy as hnp

from pallas_kernels import KeyRange, select_topk

INF, NAN = np.inf, np.nan


def one_row(scores, topk, start=0, end=None, **options):
    scores = jnp.asarray(scores, jnp.float32)[None, None]
    end = scores.shape[-1] if end is None else end
    ranges = KeyRange(jnp.full((1, 1), start, jnp.int32), jnp.full((1, 1), end, jnp.int32))
    return select_topk(scores, ranges, topk=topk, **options).indices[0, 0].tolist()


@pytest.mark.parametrize(
    ("scores", "topk", "expected"),
    [
        ([1, 5, 3, 4], 2, [1, 3]),
        ([2, 2, 2, 2], 2, [0, 1]),  # all tied
        ([3, 1, 2, 2, 2], 3, [0, 2, 3]),  # the cut goes through a tie
        ([0.0, -0.0, 0.0, -0.0], 3, [0, 1, 2]),  # the zeros are one number
        ([-0.0, 0.0, -1.0], 1, [0]),
        ([-3, -1, -2], 2, [1, 2]),
        ([1e-45, 0.0, -1e-45], 2, [0, 1]),  # subnormal numbers are numbers
        ([NAN, -INF, 1.0], 2, [1, 2]),  # NaN loses even to -inf
        ([NAN, 1.0, NAN, NAN], 3, [0, 1, 2]),  # but takes what nothing else takes
        ([-NAN, NAN, 1.0], 2, [0, 2]),  # and has no sign
        ([INF, INF, 1.0], 1, [0]),
        ([-INF, -INF, -INF], 2, [0, 1]),
        ([1.0, 2.0], 5, [0, 1]),  # topk over S
    ],
)
def test_rules(scores, topk, expected, implementation):
    assert one_row(scores, topk, implementation=implementation) == expected


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (1, 4, [1, 2, 3]),  # -inf and NaN inside the range are selected while slots remain
        (3, 3, [-1, -1, -1]),  # sees nothing
        (4, 2, [-1, -1, -1]),
        (-7, 2, [0, 1, -1]),
        (4, 99, [4, 5, -1]),
        (2, 3, [2, -1, -1]),
    ],
)
def test_only_visible_keys(start, end, expected, implementation):
    scores = [9.0, -INF, NAN, 9.0, -1.0, 9.0]
    assert one_row(scores, 3, start, end, implementation=implementation) == expected


def test_hidden_scores_do_not_matter(implementation):
    low = one_row([NAN, NAN, 1.0, 2.0, NAN], 2, 1, 4, implementation=implementation)
    high = one_row([INF, NAN, 1.0, 2.0, INF], 2, 1, 4, implementation=implementation)
    assert low == high == [2, 3]


SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-45, -1e-45, 3.4e38, 1.0000001]
SIZES = [((1, 1, 1), 1), ((1, 3, 5), 9), ((3, 7, 17), 4), ((2, 5, 40), 16)]  # [B, T, S], topk


@functools.partial(jax.jit, static_argnames=("topk", "implementation"))
def jitted(scores, ranges, topk, implementation):
    return select_topk(scores, ranges, topk=topk, implementation=implementation)


@st.composite
def rows(draw):
    shape, topk = draw(st.sampled_from(SIZES))
    number = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.integers(-2, 2))
    scores = draw(hnp.arrays(np.float32, shape, elements=number.map(np.float32)))
    bound = hnp.arrays(np.int32, shape[:2], elements=st.integers(-2, shape[2] + 2))
    return scores, KeyRange(draw(bound), draw(bound)), topk


@hypothesis.settings(deadline=None, max_examples=150, derandomize=True, database=None)
@hypothesis.given(rows())
def test_against_a_sort_in_python(case):
    scores, ranges, topk = case
    ranges = KeyRange(jnp.asarray(ranges.start), jnp.asarray(ranges.end))
    found = jitted(jnp.asarray(scores), ranges, topk, None).indices
    np.testing.assert_array_equal(found, oracle.select_topk(scores, ranges, topk))


@pytest.mark.parametrize("kind", ["normal", "plateau", "two values", "constant", "one bin"])
def test_long_rows(kind, implementation):
    """At real lengths, on what breaks radix selection: plateaus and values that share high bits."""
    keys, topk = 32768, 2048
    rng = np.random.default_rng(3)
    normal = rng.standard_normal((1, 3, keys)).astype(np.float32)
    scores = {
        "normal": normal,
        "plateau": np.where(normal > 1.9, normal, np.where(normal < -2, normal, 0.0)),
        "two values": np.where(normal > 2.0, 1.0, -1.0),
        "constant": np.zeros_like(normal),
        "one bin": np.float32(1.0) + np.float32(2**-23) * rng.integers(0, 99, normal.shape),
    }[kind].astype(np.float32)
    ranges = KeyRange(
        jnp.array([[0, 5, 20000]], jnp.int32), jnp.array([[keys, keys - 3, 21000]], jnp.int32)
    )
    found = select_topk(jnp.asarray(scores), ranges, topk=topk, implementation=implementation)
    for t, (start, end) in enumerate([(0, keys), (5, keys - 3), (20000, 21000)]):
        row = scores[0, t, start:end]
        best = np.sort(np.argsort(-row, kind="stable")[:topk]) + start
        expected = np.full(topk, -1)
        expected[: best.size] = best
        np.testing.assert_array_equal(found.indices[0, t], expected)


def test_blocks_do_not_change_the_selection(workspace_bytes, implementation):
    scores = np.random.default_rng(4).integers(-3, 3, (2, 13, 29)).astype(np.float32)
    ranges = KeyRange.causal(2, 13, offset=16)
    found = select_topk(
        jnp.asarray(scores),
        ranges,
        topk=6,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    np.testing.assert_array_equal(found.indices, oracle.select_topk(scores, ranges, 6))


def test_no_gradient_flows(implementation):
    ranges = KeyRange.causal(1, 4)

    def loss(scores):
        selection = select_topk(scores, ranges, topk=2, implementation=implementation)
        return (selection.indices * scores[..., :2]).sum()

    scores = jnp.arange(16.0).reshape(1, 4, 4)
    indices = select_topk(scores, ranges, topk=2).indices
    expected = jnp.zeros_like(scores).at[..., :2].set(indices.astype(jnp.float32))
    np.testing.assert_array_equal(jax.grad(loss)(scores), expected)
