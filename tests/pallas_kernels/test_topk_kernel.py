"""The top-k kernel compiled for an H100 (ring 2), and run on one (ring 3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from topk_rows import best, by_lax, hard_ranges, hard_rows

from pallas_kernels import KeyRange, UnsupportedError, select_topk
from pallas_kernels.dispatch import hopper_is_default
from pallas_kernels.lightning_indexer import topk_sm90
from tests import aot


@pytest.mark.aot
@pytest.mark.skipif(not aot.available(), reason="needs JAX's CUDA plugin: pip install jax[cuda13]")
@pytest.mark.parametrize(
    ("case", "registers"),
    # Two CTAs of 256 lanes an SM need 128 registers or fewer, four 64; one of 512 needs 128.
    [("long_rows", 128), ("short_rows", 64), ("ragged_rows", 64), ("few_rows", 128)],
)
def test_compiles_for_hopper(case, registers):
    report = aot.report(f"tests.pallas_kernels.aot_topk:{case}")
    assert report.spill_bytes == 0
    assert report.registers <= registers


def test_lowers_without_a_gpu():
    """Explicit "mosaic" can be traced and lowered for CUDA anywhere."""
    ranges = KeyRange.causal(2, 8)

    def select(scores):
        return select_topk(scores, ranges, topk=3, implementation="mosaic").indices

    traced = jax.jit(select).trace(jnp.zeros((2, 8, 8)))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_too_many_keys_are_refused():
    scores = jax.ShapeDtypeStruct((1, 2, 9000), jnp.float32)

    def select(scores, topk):
        return select_topk(scores, KeyRange.causal(1, 2), topk=topk, implementation="mosaic")

    with pytest.raises(UnsupportedError, match="topk=4097 is more than the 4096"):
        jax.eval_shape(lambda s: select(s, 4097), scores)
    # 5000 of at most 90 are 90.
    jax.eval_shape(lambda s: select(s, 5000), jax.ShapeDtypeStruct((1, 2, 90), jnp.float32))


on_hopper = pytest.mark.skipif(not hopper_is_default(), reason="needs a Hopper GPU")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("parts", [1, None])
@pytest.mark.parametrize(
    ("width", "topk"), [(5001, 64), (8192, 2048), (40003, 2048), (131072, 2048), (262144, 4096)]
)
def test_hard_rows(width, topk, parts):
    """Into memory that held something else, and the same bits 20 times."""
    _, rows = zip(*hard_rows(width), strict=True)
    starts, ends = hard_ranges(len(rows), width)
    scores = np.stack([*rows, *rows])
    starts = np.concatenate([np.zeros_like(starts), starts])
    ends = np.concatenate([np.full_like(ends, width), ends])
    select = jax.jit(lambda *args: topk_sm90.select_rows(*args, topk=topk, parts=parts))
    arguments = [jnp.asarray(x) for x in (scores, starts, ends)]
    jnp.full((len(scores), topk), 7, jnp.int32).block_until_ready().delete()
    got = np.asarray(select(*arguments))
    np.testing.assert_array_equal(got, best(scores, starts, ends, topk))
    for _ in range(20):
        np.testing.assert_array_equal(got, select(*arguments))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("seed", range(16))
def test_random_sizes_and_ranges(seed):
    """Few rows and many, with and without ties."""
    rng = np.random.default_rng(seed)
    keys = int(2 ** rng.uniform(3, 17.5))
    queries = int(rng.choice([1, 8, 64, 300]))
    topk = int(min(2 ** rng.uniform(0, 12.01), 4096, keys))
    scores = jax.random.normal(jax.random.key(seed), (1, queries, keys))
    scores = jnp.round(scores * 50) if seed % 2 else scores
    start, end = hard_ranges(queries, keys, seed)
    ranges = KeyRange(jnp.asarray(start)[None], jnp.asarray(end)[None])
    got = select_topk(scores, ranges, topk=topk, implementation="mosaic").indices
    np.testing.assert_array_equal(got, by_lax(scores, ranges, topk))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("queries", [1, 8, 64])
def test_few_rows(queries):
    """Rows cut into segments over the SMs; None chooses the kernel."""
    scores = jax.random.normal(jax.random.key(0), (1, queries, 131072))
    ranges = KeyRange.causal(1, queries, offset=131072 - queries)
    select = jax.jit(lambda scores: select_topk(scores, ranges, topk=2048).indices)
    assert "mosaic_gpu" in select.lower(scores).as_text()
    got = select(scores)
    np.testing.assert_array_equal(got, by_lax(scores, ranges, 2048))
    for _ in range(20):
        np.testing.assert_array_equal(got, select(scores))
