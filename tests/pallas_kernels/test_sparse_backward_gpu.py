"""The backward kernels of sparse attention on a Hopper GPU (ring 3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sparse_forward_gpu import SCALE, SHAPES, arguments

from pallas_kernels import Selection, sparse_attention
from pallas_kernels.dispatch import hopper_is_default
from pallas_kernels.hopper import column_sums
from pallas_kernels.sparse_attention import backward_sm90, reference, weights_and_sums_sm90

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper_is_default(), reason="needs a Hopper GPU"),
]

# P, dS, out, the rows and the results are rounded to bf16 (2**-9 of each value); errors of
# independent terms.
RELATIVE = 2**-7


def gradients(q, kv, indices, latent, dout, implementation):
    def attend(q, kv):
        return sparse_attention(
            q, kv, Selection(indices),
            value_width=latent, scale=SCALE, implementation=implementation,
        )  # fmt: skip

    (out, lse), pull = jax.vjp(attend, q, kv)
    dlse = jnp.where(jnp.isfinite(lse), jnp.cos(jnp.arange(lse.size).reshape(lse.shape)), 0.0)
    return pull((dout.astype(out.dtype), dlse))


@pytest.mark.parametrize("name", SHAPES)
def test_backward(name):
    """Against fp32; equal bits 20 times."""
    q, kv, indices, latent = arguments(name)
    dout = jnp.asarray(np.random.default_rng().standard_normal((*q.shape[:3], latent)))
    found = gradients(q, kv, indices, latent, dout, "mosaic")
    wide = q.astype(jnp.float32), kv.astype(jnp.float32)
    expected = gradients(*wide, indices, latent, dout, "xla")
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert error < RELATIVE
    for _ in range(20):
        again = gradients(q, kv, indices, latent, dout, "mosaic")
        assert all(map(jnp.array_equal, again, found))  # where they are: the largest have 4 GB


@pytest.mark.parametrize("cuts", [(0.3, 0.3), (0.0, 1.0), (0.2, 0.6), None])
def test_windows(cuts):
    """A query is computed alike in whatever window; keys are added up in the same order.

    Wherever that is done: beside dQ, beside P and dS of the next window, alone; or as integers.
    """
    q, kv, indices, latent = arguments("batch, 64 heads, K off the tile")
    rng = np.random.default_rng()
    dout = jnp.asarray(rng.standard_normal((*q.shape[:3], latent)), q.dtype)
    wide = q.astype(jnp.float32), kv.astype(jnp.float32)
    options = {"scale": SCALE, "workspace_bytes": 2**30}
    out, lse = reference.forward(*wide, indices, value_width=latent, **options)
    dlse = jnp.where(jnp.isfinite(lse), 1.0, 0.0)
    expected = reference.backward(*wide, indices, out, lse, dout.astype(out.dtype), dlse, **options)

    def run(window):
        fn = functools.partial(backward_sm90.gradients, scale=SCALE, window=window, cuts=cuts)
        fn = functools.partial(fn, stored=cuts is not None)
        return jax.jit(fn)(q, kv, indices, out.astype(q.dtype), lse, dout, dlse)

    (dq, dkv), (dq_again, dkv_again) = run(1000), run(32)
    np.testing.assert_array_equal(dq, dq_again)
    # Sums of fp32 that start anew, or not, with each window; units of each window.
    np.testing.assert_allclose(dkv, dkv_again, rtol=1e-5, atol=1e-5 if cuts else 1e-3)
    for one, other in zip((dq_again, dkv_again), expected, strict=True):
        error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert error < RELATIVE


def arrays_of_many_sizes(rng):
    """Columns 2**10 apart, heads 2**8, queries 10**24; a query that has one key 200 times."""
    q, kv, indices, latent = arguments("batch, 64 heads, K off the tile")
    batch, queries, heads, width = q.shape
    of_queries = 10.0 ** rng.integers(-12, 13, (batch, queries, 1, 1))
    of_columns = 2.0 ** rng.integers(-10, 1, width)
    dout = of_queries * of_columns[:latent] * rng.standard_normal((batch, queries, heads, latent))
    of_heads = 2.0 ** rng.integers(-6, 3, (1, 1, heads, 1))
    q = q * jnp.asarray(of_heads * of_columns, q.dtype)
    indices = indices.at[0, 5, 100:].set(indices[0, 5, :1])
    return q, kv, indices, jnp.asarray(dout, q.dtype)


def test_added_in_cache():
    """Keys, heads and columns of very different sizes; equal bits; what is not finite stays so."""
    q, kv, indices, dout = arrays_of_many_sizes(np.random.default_rng())
    wide = q.astype(jnp.float32), kv.astype(jnp.float32)
    options = {"scale": SCALE, "workspace_bytes": 2**30}
    out, lse = reference.forward(*wide, indices, value_width=dout.shape[-1], **options)
    dlse = jnp.zeros_like(lse)
    fn = functools.partial(backward_sm90.gradients, scale=SCALE, window=1000, stored=False)
    run = jax.jit(lambda dout: fn(q, kv, indices, out.astype(q.dtype), lse, dout, dlse))
    dq, dkv = run(dout)
    wanted = reference.backward(*wide, indices, out, lse, dout.astype(out.dtype), dlse, **options)
    difference, wanted = (np.asarray(x, np.float64) for x in (dkv - wanted[1], wanted[1]))
    # Each key against its own size: a few may be sums of large terms that cancel.
    of_keys = np.linalg.norm(difference, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert np.nanquantile(of_keys, 0.99) < 4 * RELATIVE
    np.testing.assert_array_equal(np.isnan(of_keys), (wanted == 0).all(axis=-1))
    # And each column of keys that are all scaled to one size.
    size = np.linalg.norm(wanted, axis=-1, keepdims=True)
    difference, wanted = (np.where(size > 0, x / size, 0.0) for x in (difference, wanted))
    of_columns = np.linalg.norm(difference, axis=(0, 1)) / np.linalg.norm(wanted, axis=(0, 1))
    assert of_columns.max() < 4 * RELATIVE
    for _ in range(20):
        assert all(map(jnp.array_equal, run(dout), (dq, dkv)))
    for bad in (jnp.inf, jnp.nan):
        _, dkv = run(dout.at[1, 5, 7, 3].set(bad))
        selected = np.zeros(dkv.shape[:2], bool)
        selected[1, [k for k in np.asarray(indices[1, 5]) if 0 <= k < kv.shape[1]]] = True
        np.testing.assert_array_equal(~np.isfinite(dkv).all(axis=-1), selected)


def test_bounds():
    """How large what is added to a key can be, of the P and dS that come with it."""
    rng = np.random.default_rng()

    def normal(*shape):
        sizes = 10.0 ** rng.integers(-9, 9, (*shape[:2], 1))
        return jnp.asarray(sizes * rng.standard_normal(shape), jnp.bfloat16)

    queries, heads, rows, selected, width = 40, 128, 500, 384, 576
    q, dout, out = (normal(queries, heads, n) for n in (width, 512, 512))
    q, kv = q / 1e9, jnp.asarray(rng.standard_normal((rows, width)), q.dtype)
    indices = jnp.asarray(rng.integers(-9, rows + 9, (queries, selected)), jnp.int32)
    zeros = jnp.zeros((queries, heads))
    per_column = 2.0 ** jnp.asarray(rng.integers(0, 9, width), jnp.float32)

    @jax.jit
    def run():
        return weights_and_sums_sm90.weights_and_sums(
            jnp.zeros(1, jnp.int32), q, dout, out, zeros, zeros, kv, indices, None, per_column,
            window=queries, queries=queries, rows=rows, scale=0.1, sms=132,
        )  # fmt: skip

    weights, dscores, bounds = run()
    wanted = 0.0
    for x, of in ((dscores, q), (weights, dout)):
        size = jnp.abs(of.astype(jnp.float32)) * per_column[: of.shape[-1]]
        largest = size.max(axis=-1)[:, None, :, None]
        wanted += (jnp.abs(x.astype(jnp.float32)) * largest).sum(axis=2)
    found = bounds.astype(jnp.float32).sum(axis=(2, 3))
    assert (np.asarray(wanted) > 0).any()
    np.testing.assert_allclose(found, wanted, rtol=column_sums.ROUNDINGS)


def test_unselected_rows_may_hold_anything():
    q, kv, indices, latent = arguments("batch, 64 heads, K off the tile")
    kv, indices = kv.at[:, 0].set(jnp.nan), jnp.where(indices == 0, -1, indices)
    dout = jnp.ones((*q.shape[:3], latent))
    dq, dkv = gradients(q, kv, indices, latent, dout, "mosaic")
    assert not jnp.isnan(dq).any()
    assert not jnp.isnan(dkv).any()
    assert (dkv[:, 0] == 0).all()
