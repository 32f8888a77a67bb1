"""The attention's plain functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import jit

from dsa_jax.mesh_ops import expand_keys
from dsa_jax.mla import absorb_query, masked_attention
from pallas_kernels import KeyRange, Selection, dense_attention


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_absorbed_scores_are_the_expanded_ones():
    q, kv = normal(1, 3, 2, 5 + 4), normal(1, 7, 6 + 4, seed=1)  # N=2 P=5 R=4 C=6
    up = normal(6, 2, 5 + 3, seed=2)  # V=3
    k, v = expand_keys(jnp.einsum("BSC,CNX->BSNX", kv[..., :6], up), kv[..., 6:], 5)
    assert v.shape == (1, 7, 2, 3)
    expanded = jnp.einsum("BTND,BSND->BTNS", q, k)
    absorbed = jnp.einsum("BTND,BSD->BTNS", absorb_query(q, up[..., :5]), kv)
    np.testing.assert_allclose(absorbed, expanded, atol=1e-5)  # fp32 sums of 30 products
    np.testing.assert_allclose(v, jnp.einsum("BSC,CNV->BSNV", kv[..., :6], up[..., 5:]), atol=1e-5)


def test_absorbing_in_bf16_leaves_the_rotary_part_as_it_is():
    q, up = normal(2, 3, 2, 5 + 4), normal(6, 2, 5, seed=1)
    low = q.astype(jnp.bfloat16), up.astype(jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in low]

    @jit
    def run(q, up):
        out, pull = jax.vjp(lambda q, up: absorb_query(q, up), q, up)
        return out, *pull(out)

    found, wanted = run(*low), run(*wide)
    np.testing.assert_array_equal(found[0][..., 6:], low[0][..., 5:])
    np.testing.assert_array_equal(found[1][..., 5:], low[0][..., 5:])
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        # Sums of up to six products in fp32, rounded once or, in the gradients, twice.
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-7 * float(abs(b).max()))


def test_masked_attention_over_a_range_is_dense_attention():
    q, k, v = normal(2, 70, 3, 8), normal(2, 70, 3, 8, seed=1), normal(2, 70, 3, 5, seed=2)
    ranges = KeyRange.packed(jnp.asarray(np.repeat([[1, 2, 0], [4, 4, 5]], [30, 30, 10], axis=1)))
    keys = jnp.arange(70, dtype=jnp.int32)
    # Ascending with holes: slots need not be packed for a mask.
    selection = Selection(jnp.where(ranges.mask(70), keys, -1))

    @jit
    def both(q, k, v):
        def loss(attend):
            def total(q, k, v):
                out, lse = attend(q, k, v)
                return (out**2).sum(), (out, lse)

            return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)

        masked = loss(lambda q, k, v: masked_attention(q, k, v, selection, scale=0.3))
        return masked, loss(lambda q, k, v: dense_attention(q, k, v, ranges, scale=0.3))

    masked, dense = both(q, k, v)
    (_, (out, lse)), _ = masked
    assert not out[0, 60:].any()  # padding sees nothing
    assert (lse[0, 60:] == -jnp.inf).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), masked, dense)


@pytest.mark.parametrize("length", [1, 64, 65])
def test_masked_attention_of_any_length(length):
    q, k, v = normal(1, length, 2, 4), normal(1, 65, 2, 4, seed=1), normal(1, 65, 2, 3, seed=2)
    indices = jnp.broadcast_to(jnp.array([3, 64, -1], jnp.int32), (1, length, 3))
    out, lse = jit(lambda *a: masked_attention(*a, scale=0.5))(q, k, v, Selection(indices))
    scores = 0.5 * np.einsum("tnd,snd->tns", q[0], k[0][np.array([3, 64])])
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("tns,snv->tnv", weights, v[0][np.array([3, 64])])
    np.testing.assert_allclose(out[0], expected, atol=1e-5)
    np.testing.assert_allclose(lse[0], np.log(np.exp(scores).sum(-1)), atol=1e-5)
