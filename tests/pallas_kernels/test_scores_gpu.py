"""The scores kernel and the whole indexer on a Hopper GPU (ring 3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KeyRange, indexer_scores, lightning_indexer, select_topk
from pallas_kernels.dispatch import hopper_is_default

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper_is_default(), reason="needs a Hopper GPU"),
]

# Relative error of all scores in the 2-norm. The tensor cores add e4m3 products with about 14 bits,
# bf16 products in fp32; products are exact.
ERROR = {"float8_e4m3fn": 3e-4, "bfloat16": 1e-6}

SHAPES = {  # B, T, S, I, H, dtype, k_scale
    "e4m3": (1, 300, 3001, 64, 128, "float8_e4m3fn", True),
    "one query": (3, 1, 4096, 64, 128, "float8_e4m3fn", True),
    "32 heads of 64": (2, 517, 1030, 32, 64, "float8_e4m3fn", True),
    "bf16, 16 heads": (2, 70, 515, 16, 128, "bfloat16", False),
    "bf16, heads of 64": (1, 129, 700, 64, 64, "bfloat16", True),
    "fewer keys than a tile": (2, 9, 5, 64, 128, "float8_e4m3fn", False),
}


def arguments(name):
    batch, queries, keys, heads, width, dtype, scaled = SHAPES[name]
    rng = np.random.default_rng(len(name))

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q = normal(batch, queries, heads, width).astype(dtype)
    k = normal(batch, keys, width).astype(dtype)
    w = normal(batch, queries, heads)
    scale = jnp.asarray(rng.uniform(0.5, 2.0, (batch, keys)), jnp.float32) if scaled else None
    start = rng.integers(-5, keys, (batch, queries))
    end = start + rng.integers(-5, keys, (batch, queries))
    end[:, queries - queries // 4 :] = 0  # whole blocks that see nothing
    ranges = KeyRange(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32))
    return q, k, w, ranges, scale


@pytest.mark.parametrize("name", SHAPES)
def test_scores(name):
    """Against fp32, masks exactly, into memory that held NaN, and the same bits 20 times."""
    q, k, w, ranges, scale = arguments(name)
    shape = (*q.shape[:2], k.shape[1])
    jnp.full(shape, jnp.nan).block_until_ready().delete()

    def scores(implementation, cast=lambda x: x):
        found = indexer_scores(
            cast(q), cast(k), w, ranges, k_scale=scale, implementation=implementation
        )
        return np.asarray(found)

    with jax.default_matmul_precision("highest"):
        want = scores("xla", lambda x: x.astype(jnp.float32))
    found = scores("mosaic")
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(want))
    seen = np.isfinite(want)
    error = np.linalg.norm(found[seen] - want[seen]) / np.linalg.norm(want[seen])
    assert error < ERROR[str(q.dtype)]
    for _ in range(20):
        np.testing.assert_array_equal(scores("mosaic"), found)


@pytest.mark.parametrize("workspace_bytes", [2**16, 2**30])
@pytest.mark.parametrize("name", SHAPES)
def test_selection_is_the_top_of_the_scores(name, workspace_bytes):
    """However the queries are cut into windows, the selection is exact for the kernel's scores."""
    q, k, w, ranges, scale = arguments(name)
    topk = min(100, k.shape[1] // 2)
    scores = indexer_scores(q, k, w, ranges, k_scale=scale, implementation="mosaic")
    want = select_topk(scores, ranges, topk=topk, implementation="xla")
    found = lightning_indexer(
        q, k, w, ranges, topk=topk, k_scale=scale,
        implementation="mosaic", workspace_bytes=workspace_bytes,
    )  # fmt: skip
    np.testing.assert_array_equal(found.indices, want.indices)
