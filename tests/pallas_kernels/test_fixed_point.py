"""Sums of rows by key as integers, and signs of products, in GPU interpret mode (ring 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import fixed_point, signs

ROW = plgpu.Layout.WGMMA.reduce(1)


@pytest.mark.parametrize("terms", [1, 2, 255, 2**12, 2**24])
def test_units(terms):
    """Integers as large as can be, of which no sum overflows."""
    rng = np.random.default_rng()
    largest = (10.0 ** rng.uniform(-20, 38, 1000)).astype(np.float32)
    largest[:3] = 0.5, 1.0, np.nextafter(np.float32(1), np.float32(2))
    per_one, one = fixed_point.units(jnp.asarray(largest), terms)
    np.testing.assert_array_equal(per_one * one, np.ones(1000))
    assert (np.frexp(per_one)[0] == 0.5).all()  # a power of two: the product is exact
    most = np.round(np.float64(largest) * np.float64(per_one))
    assert most.max() <= 2**21  # what adding 1.5 x 2^23 rounds to an integer
    assert terms * most.max() < 2**31
    assert most.min() * max(terms, 2**9) >= 2**28  # no bit more than these is given away


def test_units_of_no_numbers():
    largest = jnp.asarray([0.0, 1e-37, jnp.inf, jnp.nan])
    per_one, one = fixed_point.units(largest, 100)
    assert jnp.isfinite(per_one).all()
    assert (per_one[2:] == 0).all()
    sums = fixed_point.to_floats(jnp.ones((4, 3), jnp.int32), one)
    assert jnp.isfinite(sums[0]).all()
    assert (sums[1] < 2**-80).all()
    assert jnp.isnan(sums[2:]).all()


def test_words_to_floats():
    """Two sums that share 64 bits, the lower of either sign."""
    low, high = np.random.default_rng().integers(-(2**20), 2**20, (2, 5, 3))
    words = (high * 2**32 + low).view(np.int32)  # little-endian: the lower comes first
    found = fixed_point.to_floats(jnp.asarray(words.reshape(5, 6)), jnp.ones(5))
    np.testing.assert_array_equal(found, np.stack([low, high], axis=-1).reshape(5, 6))


def test_sums():
    """The twin against exact sums; the tiles in two orders, the bits alike."""
    rng = np.random.default_rng()
    keys, tiles, first = 40, 5, 7
    rows = np.float32(rng.standard_normal((tiles, 64, 128)))
    picked = rng.integers(-1, keys + 1, (tiles, 64)).astype(np.int32)
    rows *= (10.0 ** rng.uniform(-6, 6, keys + 2))[picked, None]
    inside = (picked >= 0) & (picked < keys)
    largest = np.zeros(first + keys, np.float32)
    np.maximum.at(largest, first + picked[inside], np.abs(rows).max(axis=-1)[inside])
    per_one, one = fixed_point.units(jnp.asarray(largest), tiles * 64)

    def run(rows, picked):
        def kernel(rows, picked, per_one, sums):
            for tile in range(tiles):
                some = plgpu.load(rows.at[tile], layout=plgpu.Layout.WGMMA, optimized=False)
                key = plgpu.load(picked.at[tile], layout=ROW, optimized=False)
                factor = fixed_point.look_up(per_one, key + first, True)
                options = {"limit": keys, "interpret": True}
                fixed_point.add_rows(sums, some, key, factor, jnp.int32(first), None, **options)

        sums = jax.new_ref(jnp.zeros((first + keys, 128), jnp.int32))
        plgpu.kernel(kernel, out_type=(), grid=(1,), grid_names=("cta",), interpret=interpret())(
            rows, picked, per_one, sums
        )
        return fixed_point.to_floats(jax.freeze(sums), one)

    found = run(rows, picked)
    exact = np.zeros(found.shape)
    np.add.at(exact, first + picked[inside], np.float64(rows[inside]))
    # Half a unit of each term, and fp32 in the end.
    count = np.bincount(first + picked[inside], minlength=first + keys)
    bound = np.asarray(one) * count / 2 + 2.0**-24 * np.abs(exact).max(axis=1)
    assert (np.abs(found - exact).max(axis=1) <= bound).all()
    assert (np.abs(found - exact).max(axis=1) <= 1e-4 * largest).all()
    np.testing.assert_array_equal(run(rows[::-1, ::-1], picked[::-1, ::-1]), found)


def test_signs():
    """What is packed is found again."""
    rng = np.random.default_rng()
    products = jnp.asarray(rng.standard_normal((64, 64)), jnp.float32).at[3, :5].set(0.0)
    values = jnp.asarray(rng.standard_normal(64), jnp.float32)
    words = signs.pack(products, True)
    found = signs.where_positive(words, values, True)
    np.testing.assert_array_equal(found, jnp.where(products > 0, values[:, None], 0.0))


def interpret():
    return plgpu.InterpretGPUParams(detect_races=True)
