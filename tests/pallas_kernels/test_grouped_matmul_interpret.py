"""The grouped matmul kernels in GPU interpret mode with race detection (ring 1)."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import rows_sm90, sm90, weights_sm90

BF16 = 2.5e-3  # results are rounded to bf16
DEPTH, COLUMNS = 64, 320  # one tile of columns and a part of another

SIZES = {
    "empty groups, one of several tiles": [0, 37, 0, 140, 3, 0, 11],
    "fewer rows than a box": [0, 5],
    "all in one": [0, 72, 0],
}


def arguments(name):
    sizes = np.array(SIZES[name], np.int32)
    rng = np.random.default_rng(len(name))

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(jnp.bfloat16)

    rows, groups = sizes.sum(), len(sizes)
    return normal(rows, DEPTH), normal(groups, DEPTH, COLUMNS), normal(rows, COLUMNS), sizes


def close(found, want):
    assert not interpret_pallas_call.get_races().races_found
    found = np.asarray(found, np.float32)
    assert np.linalg.norm(found - want) < BF16 * np.linalg.norm(want)


def options():
    return dict(ctas=3, interpret=plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_rows(name, transpose):
    x, w, g, sizes = arguments(name)
    x = g if transpose else x
    found = rows_sm90.multiply(x, w, jnp.asarray(sizes), transpose=transpose, **options())
    of_row = np.asarray(w, np.float32)[np.repeat(np.arange(len(sizes)), sizes)]
    of_row = of_row.swapaxes(1, 2) if transpose else of_row
    close(found, np.einsum("mk,mkn->mn", np.asarray(x, np.float32), of_row))


@pytest.mark.parametrize("name", SIZES)
def test_weights(name):
    x, _, g, sizes = arguments(name)
    found = weights_sm90.multiply(x, g, jnp.asarray(sizes), **options())
    x, g = np.asarray(x, np.float32), np.asarray(g, np.float32)
    ends = np.cumsum(sizes)
    want = np.stack(
        [x[end - n : end].T @ g[end - n : end] for n, end in zip(sizes, ends, strict=True)]
    )
    close(found, want)
    np.testing.assert_array_equal(np.asarray(found, np.float32)[sizes == 0], 0)


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_one_tile(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 400, rng.integers(1, 30)) * rng.integers(0, 2)
    sizes[seed % len(sizes)] = 5
    tiles = rows_sm90.plan(jnp.asarray(sizes, jnp.int32), int(sizes.sum()))
    owner = np.full(sizes.sum(), -1)
    for i in range(int(tiles.total[0])):
        row, low, high = (int(x[i]) for x in (tiles.row, tiles.low, tiles.high))
        assert row % rows_sm90.ALIGNMENT == 0
        mine = slice(max(row, low), min(row + rows_sm90.BLOCK, high))
        assert (owner[mine] == -1).all()
        owner[mine] = int(tiles.group[i])
    np.testing.assert_array_equal(owner, np.repeat(np.arange(len(sizes)), sizes))


def test_unsupported():
    x, w, _, _ = arguments("all in one")
    assert sm90.unsupported(x, w) is None
    for change, word in (
        ((x.astype(jnp.float32), w), "float32"),
        ((x[:, :40], w[:, :40]), "K = 40"),
        ((x, w[..., :40]), "N = 40"),
        ((x[:0], w), "M = 0"),
    ):
        assert word in sm90.unsupported(*change)
