"""Units at which rows of dKV are added up as integers (ring 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper.column_sums import ROUNDINGS
from pallas_kernels.sparse_attention import backward_units

COUNT = 40
QUERIES, SELECTED = 12, 128


def selections(rng, repeats):
    """Keys, rising; `COUNT` and more where there is none."""
    if repeats:
        keys = rng.integers(0, COUNT + 3, (QUERIES, SELECTED))
    else:
        keys = np.full((QUERIES, SELECTED), COUNT)
        for row in keys:
            count = rng.integers(COUNT)
            row[:count] = rng.permutation(COUNT)[:count]
    return np.sort(keys, axis=1).astype(np.int32)


def bounds_of(rng):
    """As the kernel leaves them: two groups of heads, four warps, tiles of 64 keys."""
    sizes = 10.0 ** rng.uniform(-20, 25, (QUERIES, SELECTED // 64, 1, 1, 64))
    parts = rng.uniform(0, 1, (QUERIES, SELECTED // 64, 2, 4, 64))
    return jnp.asarray(sizes * parts, jnp.bfloat16)


@pytest.mark.parametrize("repeats", [False, True])
def test_no_sum_overflows(repeats):
    """Every term as large as it may be; the pairs in any order."""
    rng = np.random.default_rng()
    keys, bounds = selections(rng, repeats), bounds_of(rng)
    found = backward_units.repeated(jnp.asarray(keys), COUNT)
    assert found == repeats
    find = jax.jit(lambda bounds, keys: backward_units.of_keys(bounds, keys, found, count=COUNT))
    per_one, one = find(bounds, keys)
    np.testing.assert_array_equal(per_one * one, np.ones(COUNT))
    sizes = np.asarray(bounds, np.float64).sum(axis=(2, 3)).reshape(keys.shape) * (1 + ROUNDINGS)
    there = keys < COUNT
    terms = np.rint(sizes[there] * np.asarray(per_one, np.float64)[keys[there]])
    assert terms.max() <= 2**21
    sums = np.bincount(keys[there], terms, COUNT)
    assert sums.max() < 2**31
    # And a key's integers are not smaller than they need to be.
    largest = np.zeros(COUNT)
    np.maximum.at(largest, keys[there], sizes[there])
    most = np.maximum(1, np.bincount(keys[there], minlength=COUNT) / QUERIES)
    some = largest > 1e-20
    assert (largest * most * per_one)[some].min() >= 2**20
    order = rng.permutation(QUERIES)
    for x, other in zip((per_one, one), find(bounds[order], keys[order]), strict=True):
        np.testing.assert_array_equal(x, other)


@pytest.mark.parametrize("bad", [np.inf, np.nan, -np.nan])
def test_what_is_not_finite(bad):
    """A key of which it is a bound, and no other."""
    rng = np.random.default_rng()
    keys, bounds = selections(rng, repeats=False), bounds_of(rng)
    keys[3, :2] = 4, 9
    bounds = bounds.at[3, 0, 1, 2, 1].set(bad)
    _, one = backward_units.of_keys(bounds, jnp.asarray(keys), jnp.array(False), count=COUNT)
    np.testing.assert_array_equal(np.isnan(one), np.arange(COUNT) == 9)


def test_columns():
    """Powers of two that make columns alike; what no sample tells has that of the largest."""
    rng = np.random.default_rng()
    width, values, scale = 192, 128, 0.1
    sizes = 2.0 ** rng.integers(-12, 1, width)
    sizes[5], sizes[6], sizes[100], sizes[150] = 1.0, 0.0, 2.0**-40, 0.0
    # Of two kinds, each large enough to be all that counts.
    for of_q, of_dout in ((1.0, 1e-9), (1e-9, 1.0)):
        q = jnp.asarray(of_q * sizes * rng.standard_normal((300, 64, width)), jnp.bfloat16)
        dout = of_dout * sizes[:values] * rng.standard_normal((300, 64, values))
        dout = jnp.asarray(dout, jnp.bfloat16)
        kv = jnp.asarray(rng.standard_normal((500, width)), jnp.bfloat16)
        found = np.asarray(backward_units.of_columns(q, dout, kv, scale))
        assert (np.frexp(found)[0] == 0.5).all()
        assert found.min() == 1
        assert found.max() == 2**16
        assert found[6] == found[150] == 1
        told = np.arange(values if of_dout == 1 else width)
        told = told[sizes[told] >= 2.0**-12]
        scaled = (found * sizes)[told]
        assert scaled.max() / scaled.min() < 2**3
