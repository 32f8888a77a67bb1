"""Scales at which rows of dKV are added up as integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper.add_integers import LARGEST
from pallas_kernels.sparse_attention.backward_scales import scales_of_keys

ROWS = 40


def pairs(rng, count):
    """Sizes from denormal to the largest, and their keys; some pairs have none."""
    keys = rng.integers(0, ROWS + 3, count).astype(np.int32)
    sizes = np.exp2(rng.uniform(-126, 126, count)).astype(np.float32)
    sizes[rng.random(count) < 0.1] = 0
    sizes[:3] = 1e-40, 3e38, 1.0
    keys[:3], sizes[keys == 7] = [4, 5, 6], 0
    return sizes, keys


@pytest.mark.parametrize("count", [1, 255, 5000])
def test_no_sum_overflows(count):
    """Every row as large as it may be, and as many as there are."""
    rng = np.random.default_rng(0)
    sizes, keys = pairs(rng, max(count, 3))
    most = np.bincount(keys, minlength=ROWS).max()
    scale, step = map(np.asarray, scales_of_keys(sizes, keys, rows=ROWS, most=most))
    np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)  # powers of two
    np.testing.assert_array_equal(scale * step, 1)
    there = keys < ROWS
    scaled = np.rint(sizes[there].astype(np.float64) * scale[keys[there]])
    assert scaled.max() <= LARGEST
    assert np.bincount(keys[there], scaled, ROWS).max() < 2**31
    # And the integers are not smaller than they need to be.
    largest = np.zeros(ROWS)
    np.maximum.at(largest, keys[there], sizes[there])
    told = largest > 1e-28
    room = min(LARGEST, 2**31 / most)
    assert (largest[told] * scale[told] > room / 8).all()


def test_counts_of_keys():
    """A key that few select has larger integers than one that many do."""
    sizes, keys = np.ones(10, np.float32), np.arange(10, dtype=np.int32)
    most = np.array([1, 2, 511, 512, 1023, 1024, 2**14, 2**15, 2**20, 2**24], np.int32)
    scale, _ = scales_of_keys(sizes, keys, rows=10, most=most)
    assert (np.asarray(scale, np.float64) * most < 2**31).all()
    np.testing.assert_array_equal(np.argsort(-np.asarray(scale), kind="stable"), np.arange(10))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite(bad):
    sizes, keys = pairs(np.random.default_rng(1), 400)
    sizes[keys == 9] = np.where(np.arange((keys == 9).sum()) == 0, bad, 1)
    _, step = scales_of_keys(sizes, keys, rows=ROWS, most=400)
    np.testing.assert_array_equal(np.isnan(step), np.arange(ROWS) == 9)


def test_any_order():
    rng = np.random.default_rng(2)
    sizes, keys = pairs(rng, 400)
    find = jax.jit(lambda sizes, keys: scales_of_keys(sizes, keys, rows=ROWS, most=400))
    found, order = find(sizes, keys), rng.permutation(400)
    for one, other in zip(found, find(sizes[order], keys[order]), strict=True):
        np.testing.assert_array_equal(jnp.asarray(one), other)
