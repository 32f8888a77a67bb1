"""The kernels of training on a Hopper GPU (ring 3): dense attention, warm-up loss, experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KeyRange, dense_attention, indexer_kl_dense_loss
from pallas_kernels.dispatch import hopper_is_default

# Where kernels are only compiled, there is no Flax.
grouped_matmul = pytest.importorskip("dsa_jax.grouped_matmul").grouped_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper_is_default(), reason="needs a Hopper GPU"),
]

# Relative errors in the 2-norm: results and the left factors of second products are rounded to
# bf16 (2**-9 at most each); of random signs, they come to about 2e-3 a rounding.
ERROR = 5e-3
SCALE = 0.08


def normal(rng, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)


def ragged(rng, batch, queries, keys):
    """A packed row, then windows, rows that see little or nothing, ranges beyond the keys."""
    start = rng.integers(-5, keys, (batch, queries))
    end = start + rng.integers(-5, keys, (batch, queries))
    ids = 1 + np.arange(queries) // 37
    start[0], end[0] = KeyRange.packed(jnp.asarray(ids)[None])
    end[:, queries - queries // 8 :] = 0
    return KeyRange(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32))


def wide(tree):
    def cast(x):
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    return jax.tree.map(cast, tree)


def compare(kernel, reference, *arguments):
    """Against fp32, into memory that held NaN, and the same bits 20 times."""
    jnp.full((2**26,), jnp.nan).block_until_ready().delete()
    kernel = jax.jit(kernel)
    found = jax.tree.leaves(kernel(*arguments))
    with jax.default_matmul_precision("highest"):
        want = jax.tree.leaves(jax.jit(reference)(*wide(arguments)))
    for x, y in zip(found, want, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        finite = np.isfinite(y)
        np.testing.assert_array_equal(np.isfinite(x), finite)
        assert np.linalg.norm((x - y)[finite]) <= ERROR * np.linalg.norm(y[finite])
    for _ in range(20):
        for x, y in zip(jax.tree.leaves(kernel(*arguments)), found, strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width", "value_width"),
    [(2, 300, 1003, 3, 192, 128), (1, 5, 70, 2, 128, 128), (1, 257, 129, 2, 256, 256)],
)
def test_dense_attention(batch, queries, keys, heads, width, value_width):
    rng = np.random.default_rng(queries)
    q, k = normal(rng, batch, queries, heads, width), normal(rng, batch, keys, heads, width)
    v = normal(rng, batch, keys, heads, value_width)
    dout = normal(rng, batch, queries, heads, value_width)
    ranges = ragged(rng, batch, queries, keys)
    dlse = jnp.where((ranges.end > jnp.maximum(ranges.start, 0))[..., None], 0.3, 0.0)

    def op(implementation, q, k, v, dout):
        run = functools.partial(dense_attention, scale=SCALE, implementation=implementation)
        results, pullback = jax.vjp(lambda *x: run(*x, ranges), q, k, v)
        dlses = jnp.broadcast_to(dlse, results[1].shape).astype(jnp.float32)
        return results, pullback((dout.astype(results[0].dtype), dlses))

    compare(functools.partial(op, "mosaic"), functools.partial(op, "xla"), q, k, v, dout)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "workspace_bytes"),
    [(1, 700, 1003, 5, 2**21), (2, 3, 130, 2, 2**29)],
)
def test_warm_up_loss(batch, queries, keys, heads, workspace_bytes):
    rng = np.random.default_rng(queries)
    iq, ik = normal(rng, batch, queries, 64, 128), normal(rng, batch, keys, 128)
    iw = normal(rng, batch, queries, 64, dtype=jnp.float32) / 20
    q, k = normal(rng, batch, queries, heads, 192), normal(rng, batch, keys, heads, 192)
    ranges = ragged(rng, batch, queries, keys)
    weights = normal(rng, batch, queries, dtype=jnp.float32)

    def op(implementation, iq, ik, iw, q, k):
        _, lse = dense_attention(q, k, k, ranges, scale=SCALE, implementation=implementation)

        def loss(*indexer):
            return indexer_kl_dense_loss(
                *indexer, q, k, lse, ranges, weights,
                scale=SCALE, implementation=implementation, workspace_bytes=workspace_bytes,
            )  # fmt: skip

        return jax.value_and_grad(loss, (0, 1, 2))(iq, ik, iw)

    compare(functools.partial(op, "mosaic"), functools.partial(op, "xla"), iq, ik, iw, q, k)


@pytest.mark.parametrize("sizes", [[0, 300, 0, 5, 133, 64, 0], [3], [0, 1000, 24]])
def test_grouped_matmul(sizes):
    rng = np.random.default_rng(len(sizes))
    x, w = normal(rng, sum(sizes), 320), normal(rng, len(sizes), 320, 448)
    g = normal(rng, sum(sizes), 448)

    def kernel(x, w, g):
        out, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(sizes)), x, w)
        return out, pullback(g)

    def reference(x, w, g):
        group = jnp.repeat(jnp.arange(len(sizes)), jnp.array(sizes), total_repeat_length=sum(sizes))

        def product(x, w):
            chosen = jax.nn.one_hot(group, len(sizes))
            return jnp.einsum("me,mk,ekn->mn", chosen, x, w)

        out, pullback = jax.vjp(product, x, w)
        return out, pullback(g)

    compare(kernel, reference, x, w, g)
