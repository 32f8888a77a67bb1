"""Sums of listed rows by key: the program of a warp, its twin, and how the list is divided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import add_rows
from pallas_kernels.hopper.simt_model import ModelBlock

KEYS, ROWS, NONE = 40, 300, 64


def listed(rng, count):
    """Rising keys, some without rows, one with many; rows in any order; a tail of no key."""
    keys = np.sort(rng.choice([3, 4, 7, 8, 9, 9, 9, 9, 30, KEYS - 1], count)).astype(np.int32)
    pairs = rng.permutation(ROWS)[:count].astype(np.int32)
    tail = np.full(37, NONE, np.int32)
    return np.append(pairs, 0 * tail), np.append(keys, tail)


def numbers(rng, *shape):
    """Such that every order of adding gives the same sum."""
    return rng.integers(-99, 99, shape).astype(np.float32)


def in_shares(adder, rows):
    return rows.reshape(ROWS, adder.shares, adder.share).swapaxes(0, 1)


def as_words(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).reshape(-1).view(np.uint32)


@pytest.mark.parametrize(("share", "depth"), [(192, 12), (128, 9), (64, 15)])
def test_program(share, depth):
    """What each warp does, run for all warps; more shares than one, ranges without keys."""
    rng = np.random.default_rng(0)
    adder = add_rows.Adder(
        rows=ROWS, width=2 * share, share=share, ctas=3, depth=depth, interpret=False
    )
    pairs, keys = listed(rng, 211)
    [bounds] = add_rows.bounds_of_ranges(jnp.asarray(keys), [(0, 211, 6)])
    rows, before = numbers(rng, ROWS, adder.width), numbers(rng, KEYS, adder.width)
    sums = before.copy()
    flat = sums.reshape(-1).view(np.uint32)
    block = ModelBlock(add_rows.WARP, 4)
    for unit in range(13):  # one more than there are
        arrays = as_words(in_shares(adder, rows)), pairs, keys, np.asarray(bounds), flat
        add_rows.walk(block, adder, block.constant(unit), *arrays)
    np.add.at(before, keys[:211], rows[pairs[:211]])
    np.testing.assert_array_equal(sums, before)


@pytest.mark.parametrize("count", [0, 1, 40])
def test_twin(count):
    """The twin, with more turns than one, against NumPy."""
    rng = np.random.default_rng(1)
    adder = add_rows.Adder(rows=ROWS, width=320, share=64, ctas=1, depth=3, interpret=True)
    pairs, keys = listed(rng, max(count, 1))
    [bounds] = add_rows.bounds_of_ranges(jnp.asarray(keys), [(0, count, adder.ranges)])
    rows, before = numbers(rng, ROWS, 320), numbers(rng, KEYS, 320)
    sums = jax.new_ref(jnp.asarray(before))
    kernel(adder, jnp.asarray(in_shares(adder, rows), jnp.bfloat16), pairs, keys, bounds, sums)
    assert not interpret_pallas_call.get_races().races_found
    np.add.at(before, keys[:count], rows[pairs[:count]])
    np.testing.assert_array_equal(jax.freeze(sums), before)


def kernel(adder, rows, pairs, keys, bounds, sums):
    def body(*refs):
        adder.add(jax.lax.axis_index("cta"), *refs)

    plgpu.kernel(
        body,
        grid=(adder.ctas,),
        grid_names=("cta",),
        num_threads=1,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )(rows, jnp.asarray(pairs), jnp.asarray(keys), bounds, sums)


def test_bounds():
    """Ranges begin where keys do, cover the part and are even where keys allow it."""
    rng = np.random.default_rng(2)
    keys = np.sort(rng.integers(0, 500, 5000)).astype(np.int32)
    parts = [(0, 2000, 32), (2000, 5000, 24)]
    find = jax.jit(functools.partial(add_rows.bounds_of_ranges, parts=parts))
    first, second = map(np.asarray, find(keys))
    assert first[0] == 0
    assert first[-1] == second[0]
    assert second[-1] == 5000
    for bounds in (first, second):
        inner = bounds[(bounds > 0) & (bounds < 5000)]
        assert (keys[inner] != keys[inner - 1]).all()
        assert np.ptp(np.diff(bounds)) < 60  # of a key are about ten
