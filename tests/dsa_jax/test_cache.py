"""Decoding with a cache against one long forward pass, beyond topk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import filled, jit, tokens_of

from dsa_jax import presets
from dsa_jax.cache import append, init_cache

LENGTH, CAPACITY = 34, 48  # topk is 8
# fp32; one token sums in another order than a whole sequence, and logits reach 5. Through the nine
# layers of tiny-shared the whole sequence itself is 2e-5 from float64.
ATOL = 5e-5
# The latent is rounded to e4m3. Where it lies on the boundary its last bit decides between two
# values 2^-3 apart, and the rows that attend to it move together by a few 1e-3.
FP8_ATOL, FP8_ROWS = 1e-2, 0.2


@functools.cache
def setting(name):
    """A model, tokens, and one long forward pass."""
    model = filled(presets.get(name))
    tokens = tokens_of(model.config, 2, LENGTH)
    return model, tokens, step(model, tokens)


@functools.partial(jit, static_argnames="attention")
def step(model, tokens, segment_ids=None, cache=None, attention="sparse"):
    return model(
        tokens,
        segment_ids=segment_ids,
        cache=cache,
        attention=attention,
        return_selection=attention != "dense",
    )


def chosen(selection, row):
    """Selected keys as sets, `[layers][T]`; a cache has more slots than a short sequence."""
    return [
        [{int(s) for s in keys if s >= 0} for keys in layer[row]]
        for layer in np.asarray(selection.indices)
    ]


@pytest.mark.parametrize("name", ["tiny", "tiny-fp8", "tiny-shared"])
def test_prefill_in_chunks_then_decode(name):
    """Two chunks of 16 tokens, then one by one: same logits, same keys."""
    model, tokens, whole = setting(name)
    cache = init_cache(model.config, 2, CAPACITY, jnp.float32)
    at = off = 0
    for size in (16, 16, 1, 1):
        out = step(model, tokens[:, at : at + size], cache=cache)
        cache = out.cache
        difference = np.abs(out.logits - whole.logits[:, at : at + size]).max(-1)
        off += (difference > ATOL).sum()
        assert difference.max() < (FP8_ATOL if name == "tiny-fp8" else ATOL), at
        for row in range(2):
            expected = [layer[at : at + size] for layer in chosen(whole.selection, row)]
            assert chosen(out.selection, row) == expected
        at += size
        np.testing.assert_array_equal(cache.lengths, [at, at])
    assert off <= (FP8_ROWS * 2 * LENGTH if name == "tiny-fp8" else 0)


def test_rows_of_unequal_length():
    """Right-padded prompts: every row continues as if it were alone."""
    model, tokens, whole = setting("tiny")
    lengths = jnp.array([20, 11])
    valid = (jnp.arange(20) < lengths[:, None]).astype(jnp.int32)
    cache = init_cache(model.config, 2, CAPACITY, jnp.float32)
    out = step(model, tokens[:, :20], segment_ids=valid, cache=cache)
    np.testing.assert_array_equal(out.cache.lengths, lengths)
    np.testing.assert_allclose(out.logits[0], whole.logits[0, :20], atol=ATOL)
    np.testing.assert_allclose(out.logits[1, :11], whole.logits[1, :11], atol=ATOL)
    cache = out.cache
    for _ in range(3):
        new = tokens[jnp.arange(2), cache.lengths][:, None]
        out = step(model, new, cache=cache)
        for row in range(2):
            at = int(cache.lengths[row])
            np.testing.assert_allclose(out.logits[row, 0], whole.logits[row, at], atol=ATOL)
            assert [layer[0] for layer in chosen(out.selection, row)] == [
                layer[at] for layer in chosen(whole.selection, row)
            ]
        cache = out.cache


def test_a_finished_row_stands_still():
    model, tokens, _ = setting("tiny")
    cache = init_cache(model.config, 2, CAPACITY, jnp.float32)
    cache = step(model, tokens[:, :16], cache=cache).cache
    out = step(model, tokens[:, 16:17], segment_ids=jnp.array([[1], [0]]), cache=cache)
    np.testing.assert_array_equal(out.cache.lengths, [17, 16])
    for old, new in zip(
        jax.tree.leaves(cache.stacks), jax.tree.leaves(out.cache.stacks), strict=True
    ):
        np.testing.assert_array_equal(old[:, 1], new[:, 1])
        assert (np.asarray(old[:, 0]) != np.asarray(new[:, 0])).any()


@pytest.mark.parametrize("attention", ["dense", "masked"])
def test_other_modes_with_a_cache(attention):
    model, tokens, _ = setting("tiny")
    whole = step(model, tokens, attention=attention)
    cache = init_cache(model.config, 2, CAPACITY, jnp.float32)
    cache = step(model, tokens[:, :30], cache=cache, attention=attention).cache
    out = step(model, tokens[:, 30:], cache=cache, attention=attention)
    np.testing.assert_allclose(out.logits, whole.logits[:, 30:], atol=ATOL)


def test_dense_prefill_leaves_the_indexers_keys():
    """Prefilled densely and decoded sparsely: the keys to choose from are there."""
    model, tokens, _ = setting("tiny")
    empty = init_cache(model.config, 2, CAPACITY, jnp.float32)
    dense = step(model, tokens[:, :16], cache=empty, attention="dense").cache
    sparse = step(model, tokens[:, :16], cache=empty).cache
    # In the first layer, whose input does not depend on the attention before it.
    first = lambda cache: cache.stacks[0][0].index_k[0]  # noqa: E731
    np.testing.assert_allclose(first(dense), first(sparse), atol=1e-5)
    assert np.asarray(first(dense))[:, :16].any(-1).all()


def test_fp8_keys_are_kept_in_fp8():
    cache = init_cache(presets.get("tiny-fp8"), 1, 8)
    layer = cache.stacks[0][0]
    assert layer.index_k.dtype == jnp.float8_e4m3fn
    assert layer.index_k_scale.shape == (1, 1, 8)
    assert layer.kv.dtype == jnp.bfloat16
    assert layer.kv.shape == (1, 1, 8, 136)


def test_append_writes_where_it_should():
    past = jnp.zeros((2, 4, 1))
    new = jnp.array([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    valid = jnp.array([[True, True, False], [True, True, True]])
    out = append(past, new, jnp.array([0, 2]), valid)
    # Row 1 has room for two: the third is dropped, not written over another.
    np.testing.assert_array_equal(out[..., 0], [[1, 2, 0, 0], [0, 0, 4, 5]])


def test_what_does_not_fit():
    model, tokens, _ = setting("tiny")
    config = model.config
    with pytest.raises(ValueError, match="batch 2 but the cache was made for 3 rows"):
        model(tokens, cache=init_cache(config, 3, CAPACITY))
    with pytest.raises(ValueError, match="34 new tokens do not fit: the cache holds 16"):
        model(tokens, cache=init_cache(config, 2, 16))
    nearly = init_cache(config, 2, CAPACITY)._replace(lengths=jnp.array([0, 40]))
    with pytest.raises(ValueError, match="room for 8 more in its fullest row"):
        model(tokens[:, :9], cache=nearly)
    with pytest.raises(ValueError, match="no meaning with a cache"):
        model(tokens, cache=init_cache(config, 2, CAPACITY), indexer_loss="sparse")
    with pytest.raises(ValueError, match="max_length=600 exceeds max_position_embeddings=512"):
        init_cache(config, 2, 600)
    with pytest.raises(ValueError, match="batch=0"):
        init_cache(config, 0, 16)
