"""Blocks: what fits the budget, and that cutting an axis changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tiling


def plan(workspace_bytes, *, batch=3, heads=12, queries=1000, fixed=100, per_query=10):
    return tiling.plan(
        batch=batch,
        queries=queries,
        heads=heads,
        fixed=lambda n: n * fixed,
        per_query=lambda n: n * per_query,
        workspace_bytes=workspace_bytes,
    )


@pytest.mark.parametrize(
    ("workspace_bytes", "expected"),
    [
        (10**9, tiling.Plan(3, 12, 1000)),  # all at once
        (3 * 12 * (100 + 10 * 64), tiling.Plan(3, 12, 64)),
        (3 * 12 * (100 + 10 * 64) - 1, tiling.Plan(1, 12, 211)),  # rows first
        (12 * (100 + 10 * 64) - 1, tiling.Plan(1, 6, 137)),  # then heads, by divisors
        (100 + 10 * 64, tiling.Plan(1, 1, 64)),
        (100 + 10 * 7, tiling.Plan(1, 1, 7)),
        (1, tiling.Plan(1, 1, 1)),  # what cannot be cut further
    ],
)
def test_plan(workspace_bytes, expected):
    assert plan(workspace_bytes) == expected


def test_plan_of_few_queries():
    """Few queries are no reason to cut heads: all of them fit."""
    assert plan(3 * 12 * 120, queries=2) == tiling.Plan(3, 12, 2)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [None, 1, 2, 4])
@pytest.mark.parametrize("queries", [1, 5, 12, 13])
def test_over_blocks(rows, heads, queries):
    """Every query adds once to the sums of its row and heads, and is written once."""
    batch, length, keys, width = 3, 13, 2, 4
    x = jnp.arange(batch * length * width * 2.0).reshape(batch, length, width, 2)
    k = jnp.arange(batch * keys * width * 1.0).reshape(batch, keys, width)
    flags = x[..., 0, 0] > 5
    seen = []

    def fn(sums, k, inputs, at):
        x, flags = inputs
        seen.append((x.shape, k.shape))
        new = jnp.where(at.fresh[:, None, None], x, 0.0).sum(axis=(1, 3))
        result = jnp.where(at.fresh[:, None, None], x + k.sum(axis=1)[:, None, :, None], jnp.nan)
        row = at.row + jnp.arange(x.shape[0])
        return sums + new[:, None], (result, flags, jnp.broadcast_to(row[:, None], flags.shape))

    @jax.jit
    def run(x, k):
        return tiling.over_blocks(
            fn,
            tiling.Plan(rows, heads or width, queries),
            k,
            (x, flags),
            heads=None if heads is None else width,
            start=lambda k: jnp.zeros(k.shape),
            finish=lambda sums: -sums,
        )

    sums, (results, marks, row) = run(x, k)
    some_heads = heads or width
    assert set(seen) == {((rows, queries, some_heads, 2), (rows, keys, some_heads))}
    np.testing.assert_array_equal(results, x + k.sum(axis=1)[:, None, :, None])
    np.testing.assert_array_equal(marks, flags)
    np.testing.assert_array_equal(row, np.repeat(np.arange(batch), length).reshape(batch, length))
    expected = np.repeat(x.sum(axis=(1, 3))[:, None], keys, axis=1)
    np.testing.assert_allclose(sums, -expected)


@pytest.mark.parametrize("block", [1, 2, 6])
def test_sum_over_heads(block):
    x = jnp.arange(2 * 3 * 6.0).reshape(2, 3, 6)

    def fn(head, x):
        assert x.shape == (2, 3, block)
        return (x * (1 + head + jnp.arange(block))).sum(axis=2)

    found = tiling.sum_over_heads(fn, block, jnp.ones((2, 3)), x)
    np.testing.assert_allclose(found, 1 + (x * jnp.arange(1, 7)).sum(axis=2))


def test_cut():
    x = jnp.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(tiling.cut(x, (1, 1, 2), (1, None, 2)), x[1:, :, 2:])
    np.testing.assert_array_equal(tiling.cut(x[..., 0], (1, 1, 2), (1, 2, 2)), x[1:, 1:, 0])
