"""The kernels of sparse attention's backward in GPU interpret mode with race detection (ring 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import add_rows
from pallas_kernels.sparse_attention import (
    backward_lists,
    backward_sm90,
    dq_sm90,
    reference,
    rows_sm90,
    weights_and_sums_sm90,
)
from pallas_kernels.sparse_attention.backward_shares import share_columns

SCALE = 0.1
# P, dS, out and the results are rounded to bf16 (2**-9 of each value); the sums are of independent
# such errors.
RELATIVE = 2**-8


def interpret():
    return plgpu.InterpretGPUParams(detect_races=True)


def no_races():
    return not interpret_pallas_call.get_races().races_found


def normal(rng, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)


def arguments(batch, queries, keys, heads, latent, rope, selected):
    """Rows with all, no, one and some keys, with indices outside the keys among them."""
    rng = np.random.default_rng(0)
    q = normal(rng, batch, queries, heads, latent + rope)
    kv = normal(rng, batch, keys, latent + rope).at[:, -1].set(jnp.nan)  # which no query selects
    indices = np.full((batch, queries, selected), -1, np.int32)
    for row, (b, t) in enumerate(np.ndindex(batch, queries)):
        count = [selected, 0, selected // 2 + 3, 1][row % 4]
        indices[b, t, :count] = np.sort(rng.permutation(keys - 1)[:count])
    indices[0, 0, 5], indices[0, 0, 9] = keys, -7
    dout = normal(rng, batch, queries, heads, latent)
    dlse = normal(rng, batch, queries, heads, dtype=jnp.float32)
    return q, kv, jnp.asarray(indices), dout, dlse


def wide(*arrays):
    return [x.astype(jnp.float32) for x in arrays]


def error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("window", [9, 1])
def test_backward(window):
    """The kernels and what is between them, against fp32; in one window, and in two."""
    q, kv, indices, dout, dlse = arguments(2, 1, 90, 64, 256, 0, 70)
    options = {"scale": SCALE, "workspace_bytes": 2**30}
    out, lse = reference.forward(*wide(q, kv), indices, value_width=256, **options)
    expected = reference.backward(*wide(q, kv), indices, out, lse, *wide(dout), dlse, **options)
    out = out.astype(q.dtype)
    # Not jitted: two interpreted kernels in one program wait for each other.
    found = backward_sm90.gradients(
        q, kv, indices, out, lse, dout, dlse,
        scale=SCALE, window=window, sms=2, interpret=interpret(),
    )  # fmt: skip
    assert no_races()
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < RELATIVE


def products_of(weights, dscores, q, dout, kv, indices):
    """dQ and the rows of all queries, in fp32."""
    q, dout, kv = wide(q, dout, kv)
    rows, _ = reference.gather(kv[None], indices[None])
    padded = jnp.pad(dout, ((0, 0), (0, 0), (0, q.shape[-1] - dout.shape[-1])))
    added = jnp.einsum("tnk,tnd->tkd", dscores, q) + jnp.einsum("tnk,tnd->tkd", weights, padded)
    return jnp.einsum("tnk,tkd->tnd", dscores, rows[0]), added


def in_tiles(x):
    queries, heads, selected = x.shape
    return x.reshape(queries, heads, selected // 64, 64).swapaxes(1, 2)


def rows_to_sum(rng, queries, selected, width, ranges):
    """Rows of selections with holes at their ends: `(rows, pairs, keys, bounds)`, sums, new sums.

    Of 150 keys some are selected by no query.
    """
    keys = 150
    picked = np.full((queries, selected), keys, np.int32)
    for t in range(queries):
        count = [30, 0, 20, 1][t % 4]
        picked[t, :count] = np.sort(rng.permutation(np.arange(10, keys))[:count])
    rows = rng.integers(-99, 99, (queries, selected, width))
    pairs, in_order = backward_lists.pairs_by_key(jnp.asarray(picked), largest=keys)
    count = jnp.int32((picked < keys).sum())
    [bounds] = add_rows.bounds_of_ranges(in_order, [(0, count, ranges)])
    before = rng.integers(-99, 99, (keys, width)).astype(np.float32)
    after = before.copy()
    np.add.at(after, picked[picked < keys], rows[picked < keys])
    shares = jnp.asarray(rows, jnp.bfloat16).reshape(queries * selected, -1, share_columns(width))
    added = jax.new_ref(shares.swapaxes(0, 1))
    return (added, pairs, in_order, bounds), jax.new_ref(jnp.asarray(before)), after


def test_second_window():
    """128 heads; a window that starts late and ends past the last query; queries in a row."""
    q, kv, indices, dout, _ = arguments(1, 3, 200, 128, 256, 64, 128)
    q, kv, indices, dout = q[0], kv[0], indices[0], dout[0]
    rng = np.random.default_rng(1)
    lse, dlse = (normal(rng, 3, 128, dtype=jnp.float32) for _ in range(2))
    out = normal(rng, *dout.shape)
    delta = jnp.einsum("tnc,tnc->tn", *wide(out, dout)) - dlse
    window = {"window": 3, "queries": 3, "rows": 200, "sms": 2, "interpret": interpret()}
    start = jnp.array([1], jnp.int32)
    ranges = weights_and_sums_sm90.adder_of(384, q.shape[-1], 128, 2).ranges
    listed, sums, after = rows_to_sum(rng, 3, 128, q.shape[-1], ranges)
    weights, dscores = weights_and_sums_sm90.weights_and_sums(
        start, q, dout, out, lse + 9, dlse, kv, indices, *listed, sums, scale=SCALE, **window
    )
    assert no_races()
    np.testing.assert_array_equal(jax.freeze(sums), after)
    rows, exists = reference.gather(wide(kv)[0][None], indices[None])
    q32, dout32 = wide(q, dout)
    scores = SCALE * jnp.einsum("tnd,tkd->tnk", q32, rows[0]) - (lse + 9)[..., None] * np.log(2)
    expected = jnp.where(exists[0, :, None], jnp.exp(scores), 0.0)
    dweights = jnp.einsum("tnc,tkc->tnk", dout32, rows[0, ..., :256])
    dexpected = SCALE * expected * (dweights - delta[..., None])
    for found, other in ((weights, expected), (dscores, dexpected)):
        assert error(found[:2], in_tiles(other)[1:]) < RELATIVE

    dq, added = (jax.new_ref(jnp.zeros(shape, q.dtype)) for shape in (q.shape, (5, 3 * 128, 64)))
    ranges = dq_sm90.adder_of(384, q.shape[-1], 2).ranges
    listed, sums, after = rows_to_sum(rng, 3, 128, q.shape[-1], ranges)
    dq_sm90.dq_of_queries(start, kv, indices, dscores, *listed, sums, dq, **window)
    assert no_races()
    np.testing.assert_array_equal(jax.freeze(sums), after)
    options = {name: window[name] for name in ("window", "sms", "interpret")}
    rows_sm90.rows_of_queries(start, q, dout, weights, dscores, added, **options)
    assert no_races()
    dq, added = jax.freeze(dq), jax.freeze(added).swapaxes(0, 1).reshape(3, 128, -1)
    assert not dq[0].any()  # it comes before the window
    assert not added[2].any()  # which ends here

    def flat(x):
        return jnp.pad(wide(x)[0].swapaxes(1, 2).reshape(3, 128, 128)[:2], ((1, 0), (0, 0), (0, 0)))

    expected = products_of(flat(weights), flat(dscores), q, dout, kv, indices)
    for found, other in zip((dq[1:], added[:2]), expected, strict=True):
        assert error(found, other[1:]) < RELATIVE


@pytest.mark.parametrize("order", ["rising", "holes", "any"])
def test_ascending(order):
    rng = np.random.default_rng(0)
    picked = np.sort(rng.integers(0, 50, (3, 20)), axis=1)
    picked[1, 9:] = -1
    if order != "rising":
        picked[0, [3, 7, 9]] = -2, 50, 2**31 - 1
    if order == "any":
        picked = rng.permuted(picked, axis=1)
    found = jax.jit(backward_lists.ascending, static_argnums=1)(jnp.asarray(picked), 50)
    expected = np.sort(np.where((picked < 0) | (picked >= 50), 50, picked), axis=1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shift", [0, 2**16])
def test_pairs_by_key(shift):
    """Queries ascend within a key; what is no key comes last."""
    rng = np.random.default_rng(0)
    keys = np.sort(rng.integers(0, 30, (70, 20)), axis=1).astype(np.int32) + shift
    find = jax.jit(backward_lists.pairs_by_key, static_argnames="largest")
    pairs, in_order = map(np.asarray, find(keys, largest=29 + shift))
    expected = np.argsort(keys.reshape(-1), kind="stable")
    np.testing.assert_array_equal(pairs, expected)
    np.testing.assert_array_equal(in_order, keys.reshape(-1)[expected])
