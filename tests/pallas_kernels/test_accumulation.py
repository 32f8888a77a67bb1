"""Gradients of keys are sums over queries: in bf16 they must be added up in fp32.

A thousand queries give the same to a key. Added up in bf16 such a sum stops growing at 2**8 times
its terms, and one query after another would lose half of it or more.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels import KeyRange, Selection

T = 1000
RANGES = KeyRange(jnp.zeros((1, T), jnp.int32), jnp.full((1, T), 2, jnp.int32))
BOTH = Selection(jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (1, T, 2)))


def zeros(*shape):
    return jnp.zeros(shape, jnp.bfloat16)


@pytest.fixture(params=["whole", "queries"])
def options(request, implementation):
    """All queries at once, and a budget that holds one query."""
    return {
        "implementation": implementation,
        "workspace_bytes": 2**29 if request.param == "whole" else 1,
    }


def test_sparse_attention(options):
    """Queries of zeros weigh two keys alike: each gets T / 2 as a value, and nothing as a key."""

    def total(kv):
        out, _ = ops.sparse_attention(
            zeros(1, T, 1, 3), kv, BOTH, value_width=2, scale=1.0, **options
        )
        return out.astype(jnp.float32).sum()

    expected = np.broadcast_to([T / 2, T / 2, 0.0], (1, 2, 3))
    np.testing.assert_array_equal(jax.grad(total)(zeros(1, 2, 3)).astype(jnp.float32), expected)


def test_dense_attention(options):
    """Values as above; and keys get the difference of their values, here +-1 / 4 a query."""
    v = jnp.array([1.0, 0.0], jnp.bfloat16).reshape(1, 2, 1, 1)

    def total(k, v):
        q = jnp.zeros((1, T, 1, 1), jnp.bfloat16) + 1
        out, _ = ops.dense_attention(q, k, v, RANGES, scale=1.0, **options)
        return out.astype(jnp.float32).sum()

    dk, dv = jax.grad(total, argnums=(0, 1))(zeros(1, 2, 1, 1), v)
    np.testing.assert_array_equal(dv.astype(jnp.float32).ravel(), [T / 2, T / 2])
    np.testing.assert_array_equal(dk.astype(jnp.float32).ravel(), [T / 4, -T / 4])


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_indexer_loss(stage, options):
    """Scores 1/2 and 1 against a flat target: every query gives softmax - 1 / 2 to its keys."""
    iq, iw = zeros(1, T, 1, 1) + 1, jnp.ones((1, T, 1))
    ik = jnp.array([0.5, 1.0], jnp.bfloat16).reshape(1, 2, 1)
    lse = jnp.full((1, T, 1), jnp.log(2.0))

    def total(ik):
        indexer = (iq, ik, iw, zeros(1, T, 1, 1))
        if stage == "dense":
            kl = ops.indexer_kl_dense(
                *indexer, zeros(1, 2, 1, 1), lse, RANGES, scale=1.0, **options
            )
        else:
            kl = ops.indexer_kl_sparse(*indexer, zeros(1, 2, 1), lse, BOTH, scale=1.0, **options)
        return kl.sum()

    softmax = np.exp([0.5, 1.0]) / np.exp([0.5, 1.0]).sum()
    found = jax.grad(total)(ik).astype(jnp.float32).ravel()
    np.testing.assert_allclose(found, T * (softmax - 0.5), rtol=2**-8)  # rounded once, to 8 bits


def test_indexer_scores(options):
    def total(k):
        q = zeros(1, T, 1, 1) + 1
        return ops.indexer_scores(q, k, jnp.ones((1, T, 1)), RANGES, **options).sum()

    found = jax.grad(total)(zeros(1, 2, 1) + 1)
    np.testing.assert_array_equal(found.astype(jnp.float32).ravel(), [T, T])
