"""Attention from a paged cache: where the rows lie must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import oracle
import pytest

from pallas_kernels import Fp8Pages, sparse_attention, sparse_attention_decode

PAGES, PAGE_SIZE = 9, 4
OPTIONS = {"value_width": op_cases.C, "scale": op_cases.SCALE}
FP32 = {"rtol": 2e-5, "atol": 5e-6}  # as in test_sparse_attention.py


def scattered(case, rng):
    """The case's keys in shuffled slots of a pool, and its selection as slots in shuffled order."""
    batch, keys, width = case.kv.shape
    place = rng.permutation(PAGES * PAGE_SIZE)[: batch * keys].reshape(batch, keys)
    pool = np.full((PAGES * PAGE_SIZE, width), np.nan)  # free slots hold anything
    pool[place] = oracle.f64(case.kv)
    indices = np.asarray(case.selection.indices)
    rows = np.arange(batch)[:, None, None]
    slots = np.where(indices >= 0, place[rows, indices], -1)
    slots = rng.permuted(slots, axis=-1)
    pages = jnp.asarray(pool, case.kv.dtype).reshape(PAGES, PAGE_SIZE, width)
    return pages, jnp.asarray(slots, jnp.int32), place


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pages_equal_contiguous_keys(dtype, implementation, workspace_bytes):
    case = op_cases.case("packed", dtype)
    pages, slots, _ = scattered(case, np.random.default_rng(0))
    out, lse = sparse_attention_decode(
        case.q,
        pages,
        slots,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
        **OPTIONS,
    )
    expected, expected_lse = sparse_attention(case.q, case.kv, case.selection, **OPTIONS)
    assert out.dtype == dtype
    # The same products in another order, rounded once to the dtype.
    tolerance = FP32 if dtype == jnp.float32 else {"rtol": 2**-7, "atol": 2**-10}
    np.testing.assert_allclose(oracle.f64(out), oracle.f64(expected), **tolerance)
    np.testing.assert_allclose(lse, expected_lse, **FP32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fp8_pages(dtype, implementation):
    """Against the oracle on the rows that the pages stand for, two scale blocks a row."""
    rng = np.random.default_rng(1)
    latent_width, rope_width, heads, selected = 8, 4, 3, 5
    pool = (PAGES, PAGE_SIZE)
    latent = jnp.asarray(rng.standard_normal((*pool, latent_width)), jnp.float8_e4m3fn)
    # Any positive scale, powers of two or not.
    scale = jnp.asarray(rng.uniform(0.2, 2.0, (*pool, 2)), jnp.float32)
    rope = jnp.asarray(rng.standard_normal((*pool, rope_width)), jnp.bfloat16)
    q = jnp.asarray(rng.standard_normal((2, 3, heads, 12)), dtype)
    slots = jnp.asarray(rng.integers(-1, PAGES * PAGE_SIZE, (2, 3, selected)), jnp.int32)
    slots = slots.at[1, 2].set(-1)
    out, lse = sparse_attention_decode(
        q,
        Fp8Pages(latent, scale, rope),
        slots,
        value_width=latent_width,
        scale=op_cases.SCALE,
        implementation=implementation,
    )
    rows = np.concatenate(
        [oracle.f64(latent) * np.repeat(oracle.f64(scale), 4, axis=-1), oracle.f64(rope)], axis=-1
    ).reshape(1, -1, 12)
    expected, expected_lse = oracle.sparse_attention(
        q, np.repeat(rows, 2, axis=0), slots, value_width=latent_width, scale=op_cases.SCALE
    )
    np.testing.assert_allclose(lse, expected_lse, **FP32)
    # bf16: one rounding of out to 8 bits.
    tolerance = FP32 if dtype == jnp.float32 else {"rtol": 2**-7, "atol": 2**-10}
    np.testing.assert_allclose(oracle.f64(out), expected, **tolerance)
    np.testing.assert_array_equal(oracle.f64(out[1, 2]), 0.0)


@pytest.mark.parametrize("outside", [-9, PAGES * PAGE_SIZE, 2**31 - 1])
def test_slots_outside_the_cache_are_ignored(outside, implementation):
    case = op_cases.case("packed")
    pages, slots, _ = scattered(case, np.random.default_rng(2))
    odd = jnp.where(slots < 0, outside, slots)
    assert (odd != slots).any()
    a = sparse_attention_decode(case.q, pages, slots, implementation=implementation, **OPTIONS)
    b = sparse_attention_decode(case.q, pages, odd, implementation=implementation, **OPTIONS)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_empty_pages_read_as_zero():
    pages = Fp8Pages.zeros(2, 4, latent_width=256, rope_width=64)
    assert pages.scale.shape == (2, 4, 2)
    assert sum(x.nbytes for x in pages) == 8 * (256 + 2 * 4 + 64 * 2)
    q = jnp.ones((1, 1, 1, 320), jnp.bfloat16)
    slots = jnp.arange(3, dtype=jnp.int32)[None, None]
    out, lse = sparse_attention_decode(q, pages, slots, value_width=256, scale=1.0)
    np.testing.assert_array_equal(oracle.f64(out), 0.0)
    np.testing.assert_allclose(lse, np.log(3.0), rtol=1e-6)


def test_differentiating_says_what_to_do():
    case = op_cases.case("packed")
    pages, slots, _ = scattered(case, np.random.default_rng(3))

    def loss(q):
        return sparse_attention_decode(q, pages, slots, **OPTIONS)[0].sum()

    with pytest.raises(NotImplementedError, match="Train through sparse_attention"):
        jax.grad(loss)(case.q)
