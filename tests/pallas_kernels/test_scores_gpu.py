"""The scores kernel and the whole indexer on a Hopper GPU (ring 3)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selection_margin import MARGIN, differences

from pallas_kernels import KeyRange, indexer_scores, lightning_indexer, select_topk
from pallas_kernels.dispatch import hopper_is_default

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper_is_default(), reason="needs a Hopper GPU"),
]

# Relative error of all scores in the 2-norm. The tensor cores add e4m3 products with about 14 bits,
# bf16 products in fp32; products are exact.
ERROR = {"float8_e4m3fn": 3e-4, "bfloat16": 1e-6}

SHAPES = {  # B, T, S, I, H, dtype, k_scale, ranges
    "one query": (3, 1, 4096, 64, 128, "float8_e4m3fn", True, "ragged"),
    "two queries": (5, 2, 3001, 64, 128, "bfloat16", True, "ragged"),
    "eight queries of 16 heads": (3, 8, 1032, 16, 64, "float8_e4m3fn", False, "packed"),
    "fewer keys than a tile": (2, 9, 5, 64, 128, "float8_e4m3fn", False, "ragged"),
    "long": (1, 300, 3001, 64, 128, "float8_e4m3fn", True, "context-parallel"),
}
_sizes = itertools.cycle([(2, 70, 515), (1, 129, 700), (2, 257, 1030)])
_kinds = itertools.cycle(["packed", "ragged", "context-parallel"])
for _heads, _width, _dtype in itertools.product([16, 32, 64], [64, 128], ERROR):
    SHAPES[f"{_heads} heads of {_width}, {_dtype}"] = (
        *next(_sizes), _heads, _width, _dtype, _width == 128, next(_kinds),
    )  # fmt: skip


def key_ranges(kind: str, batch: int, queries: int, keys: int, rng) -> KeyRange:
    """Ranges of queries over more keys than queries."""
    if kind == "context-parallel":  # a shard of the queries over all keys, another in each row
        return KeyRange.causal(batch, queries, offset=jnp.arange(batch) * 97 + keys // 3)
    if kind == "packed":  # documents, and padding at the end; the keys are those of a longer row
        lengths = rng.multinomial(queries, [0.3, 0.05, 0.4, 0.25], size=batch)
        ids = np.stack([np.repeat([1, 2, 3, 0], row) for row in lengths])
        return KeyRange.packed(jnp.asarray(ids))
    start = rng.integers(-5, keys, (batch, queries))
    end = start + rng.integers(-5, keys, (batch, queries))
    end[:, queries - queries // 4 :] = 0  # whole blocks that see nothing
    return KeyRange(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32))


def arguments(name):
    batch, queries, keys, heads, width, dtype, scaled, kind = SHAPES[name]
    rng = np.random.default_rng(len(name))

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q = normal(batch, queries, heads, width).astype(dtype)
    k = normal(batch, keys, width).astype(dtype)
    w = normal(batch, queries, heads)
    scale = jnp.asarray(rng.uniform(0.5, 2.0, (batch, keys)), jnp.float32) if scaled else None
    return q, k, w, key_ranges(kind, batch, queries, keys, rng), scale


def poison(shape, value, dtype=jnp.float32):
    """Leaves a value in the memory that the next result of this shape is likely to get."""
    jnp.full(shape, value, dtype).block_until_ready().delete()


@pytest.mark.parametrize("name", SHAPES)
def test_scores_and_selection(name):
    """Against fp32, into poisoned memory, the same bits 20 times; the selection is their top."""
    q, k, w, ranges, scale = arguments(name)
    topk = min(100, k.shape[1] // 2)
    scores = jax.jit(lambda q, k, how: indexer_scores(q, k, w, ranges, k_scale=scale,
                     implementation=how), static_argnums=2)  # fmt: skip
    # Cast before the call: XLA multiplies what it can see to be e4m3 on the tensor cores.
    exact = scores(q.astype(jnp.float32), k.astype(jnp.float32), "xla")
    poison(exact.shape, jnp.nan)
    kernels = scores(q, k, "mosaic")
    found, want = np.asarray(kernels), np.asarray(exact)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(want))
    seen = np.isfinite(want)
    error = np.linalg.norm(found[seen] - want[seen]) / np.linalg.norm(want[seen])
    assert error < ERROR[str(q.dtype)]
    for _ in range(20):
        np.testing.assert_array_equal(scores(q, k, "mosaic"), found)

    best = select_topk(kernels, ranges, topk=topk, implementation="xla").indices
    for workspace_bytes in (2**16, 2**30):  # a few queries at a time, and all at once
        select = jax.jit(lambda q, k, limit=workspace_bytes: lightning_indexer(q, k, w, ranges,
                         topk=topk, k_scale=scale, workspace_bytes=limit).indices)  # fmt: skip
        poison(best.shape, 7, jnp.int32)
        indices = select(q, k)
        np.testing.assert_array_equal(indices, best)
        assert differences(indices, exact, topk, MARGIN[str(q.dtype)]).beyond == 0
        for _ in range(20):
            np.testing.assert_array_equal(select(q, k), indices)


def test_nan_loses():
    """A query of NaN scores selects the first keys it sees; a NaN key is selected by nobody."""
    q, k, w, _, _ = arguments("64 heads of 128, bfloat16")
    ranges = KeyRange.causal(*q.shape[:2], offset=200)
    q, k = q.at[0, 5].set(jnp.nan), k.at[:, 17].set(jnp.nan)
    found = np.asarray(lightning_indexer(q, k, w, ranges, topk=50, implementation="mosaic").indices)
    np.testing.assert_array_equal(found[0, 5], np.arange(50))
    others = np.delete(found.reshape(-1, 50), 5, axis=0)
    assert not (others == 17).any()
    assert (others >= 0).all()
