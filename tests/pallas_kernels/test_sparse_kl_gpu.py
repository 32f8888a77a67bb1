"""The sparse loss's kernels on a Hopper GPU (ring 3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sparse_forward_gpu import SCALE, SHAPES, arguments

from pallas_kernels import Selection, indexer_kl_sparse, sparse_attention
from pallas_kernels.dispatch import hopper_is_default
from pallas_kernels.indexer_loss import reference, sparse_bounds_sm90, sparse_sm90

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper_is_default(), reason="needs a Hopper GPU"),
]

# d, the masked products, the rows and the results are rounded to bf16 (2**-9 of each value); errors
# of independent terms.
RELATIVE = 2**-7


def indexer_of(rng, q, kv):
    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    iq, ik = normal(*q.shape[:2], 64, 128), normal(*kv.shape[:2], 128)
    return iq.astype(q.dtype), ik.astype(q.dtype), normal(*q.shape[:2], 64) / 8


def loss(iq, ik, iw, q, kv, indices, latent, g, implementation):
    """`(kl, gradients)`; a query's weight is of either sign."""
    selection = Selection(indices)
    _, lse = sparse_attention(
        q, kv, selection, value_width=latent, scale=SCALE, implementation=implementation
    )

    def kl(iq, ik, iw):
        return indexer_kl_sparse(
            iq, ik, iw, q, kv, lse, selection, scale=SCALE, implementation=implementation
        )

    value, pull = jax.vjp(kl, iq, ik, iw)
    return value, *pull(g)


@pytest.mark.parametrize("name", [name for name in SHAPES if "2**31" not in name])
def test_value_and_gradient(name):
    """Against fp32, into memory that held NaN; equal bits 20 times."""
    q, kv, indices, latent = arguments(name)
    rng = np.random.default_rng()
    indexer = indexer_of(rng, q, kv)
    g = jnp.asarray(rng.standard_normal(q.shape[:2]), jnp.float32)
    jnp.full((2**28,), jnp.nan, jnp.float32).block_until_ready().delete()
    run = jax.jit(functools.partial(loss, latent=latent, implementation="mosaic"))
    found = run(*indexer, q, kv, indices, g=g)
    wide = [x.astype(jnp.float32) for x in (*indexer, q, kv)]
    reference = functools.partial(loss, latent=latent, implementation="xla")
    # Without Triton's candidates, whose compilation takes longer than the test.
    reference = jax.jit(reference, compiler_options={"xla_gpu_enable_triton_gemm": False})
    expected = reference(*wide, indices=indices, g=g)
    # fp32 sums of terms as large as a few nats, from an lse that is off by a few 2**-24 of itself.
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5, atol=2e-5)
    for one, other in zip(found[1:], expected[1:], strict=True):
        error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert error < RELATIVE
    for _ in range(20):
        assert all(map(np.array_equal, run(*indexer, q, kv, indices, g=g), found))


def residuals_of(name):
    """`(arguments of the op, with random indexers; what the backward needs)`."""
    q, kv, indices, latent = arguments(name)
    indexer = indexer_of(np.random.default_rng(), q, kv)
    _, lse = sparse_attention(q, kv, Selection(indices), value_width=latent, scale=SCALE)
    inputs = (*indexer, q, kv, lse, indices)
    return inputs, sparse_sm90.forward_for_backward(*inputs, scale=SCALE)[1]


def error(found, want):
    found, want = (x.astype(jnp.float32) for x in (found, want))
    return jnp.linalg.norm(found - want) / jnp.linalg.norm(want)


def test_windows():
    """A query's gradients are alike in whatever window."""
    inputs, residuals = residuals_of("batch, 64 heads, K off the tile")
    g = jnp.ones(inputs[3].shape[:2])

    def run(window):
        return jax.jit(functools.partial(sparse_sm90.gradients, window=window))(residuals, g)

    (diq, dik, diw), again = run(1000), run(32)
    np.testing.assert_array_equal(diq, again[0])
    np.testing.assert_array_equal(diw, again[2])
    # Integers of other units; then rounded to bf16.
    assert error(dik, again[1]) < 2**-8


def test_ways(monkeypatch):
    """Rows that are stored, and rows that are added up in the L2; equal bits 20 times."""
    inputs, residuals = residuals_of("batch, 64 heads, K off the tile")
    # Keys of small gradients keep their precision: each key has its own unit.
    g = jnp.asarray(
        10.0 ** np.random.default_rng().uniform(-8, 8, inputs[3].shape[:2]), jnp.float32
    )
    wide = [x.astype(jnp.float32) for x in inputs[:-1]]
    options = {"xla_gpu_enable_triton_gemm": False}
    want = jax.jit(
        functools.partial(reference.sparse_backward, scale=SCALE, workspace_bytes=2**30),
        compiler_options=options,
    )((*wide, inputs[-1]), g)[1]
    for cached in (False, True):
        monkeypatch.setattr(sparse_sm90, "in_cache", lambda size, cached=cached: cached)
        run = jax.jit(lambda r, g: sparse_sm90.gradients(r, g, window=1000, dik_dtype=jnp.float32))
        jnp.full((2**28,), jnp.nan, jnp.float32).block_until_ready().delete()
        found = run(residuals, g)
        # Key by key, but for some whose terms cancel: these are rounded to bf16.
        norm = jnp.linalg.norm(want, axis=-1)
        errors = jnp.linalg.norm(found[1] - want, axis=-1) / jnp.where(norm > 0, norm, 1)
        assert jnp.quantile(errors, 0.99) < 2**-6
        assert error(found[1], want) < RELATIVE
        for _ in range(20):
            assert all(map(np.array_equal, run(residuals, g), found))


def test_bounds():
    """Exact, of more keys than one table holds, in a window that ends after the last query."""
    rng = np.random.default_rng()
    batch, queries, rows, selected, window = 2, 150, 30000, 1088, 200
    total, first = batch * queries, jnp.asarray([window], jnp.int32)
    assert batch * rows > sparse_bounds_sm90.TABLE
    d = jnp.asarray(rng.standard_normal((total, selected)), jnp.float32)
    factors = jnp.asarray(10.0 ** rng.uniform(-8, 8, total), jnp.float32).at[-1].set(jnp.nan)
    indices = jnp.asarray(rng.integers(-1, rows + 1, (total, selected)), jnp.int32)
    plan = sparse_sm90._Plan(queries, rows, batch * rows, window, 132)
    given = factors, d, indices
    found = sparse_bounds_sm90.bounds(first, *given, keys=plan.keys, **plan.sizes(), sms=132)
    # The twin's windows end with the last query.
    some = plan._replace(window=total - window)
    want = sparse_sm90.bounds(first[0], factors, d, jnp.where(indices < 0, rows, indices), some)
    np.testing.assert_array_equal(found, want)
    assert 0 < jnp.isnan(found).sum() <= selected


def test_not_finite():
    """A query whose weight is no number spoils its keys, and no others."""
    inputs, residuals = residuals_of("more keys than the L2 holds, some forth and some back")
    keys = inputs[1].shape[1]
    for value in (jnp.nan, jnp.inf):
        g = jnp.ones(inputs[3].shape[:2]).at[0, 3].set(value)
        finite = jnp.isfinite(sparse_sm90.backward(residuals, g)[1]).all(axis=-1)[0]
        picked = inputs[-1][0, 3]
        picked = picked[(picked >= 0) & (picked < keys)]
        assert len(picked)
        np.testing.assert_array_equal(finite, jnp.ones(keys, bool).at[picked].set(False))


def test_unselected_rows_may_hold_anything():
    q, kv, indices, latent = arguments("batch, 64 heads, K off the tile")
    iq, ik, iw = indexer_of(np.random.default_rng(), q, kv)
    indices = jnp.where(indices == 0, -1, indices)
    kv, ik = kv.at[:, 0].set(jnp.nan), ik.at[:, 0].set(jnp.nan)
    found = loss(iq, ik, iw, q, kv, indices, latent, jnp.ones(q.shape[:2]), "mosaic")
    assert not any(jnp.isnan(x).any() for x in found)
    assert (found[2][:, 0] == 0).all()
