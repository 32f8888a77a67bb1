"""The scores kernel in GPU interpret mode with race detection (ring 1), and its schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import KeyRange, UnsupportedError, indexer_scores, lightning_indexer
from pallas_kernels.lightning_indexer import (
    reference,
    scores_sm90,
    selection_sm90,
    tile_shares,
)
from pallas_kernels.lightning_indexer.scores_operands import Tiling

# fp32 sums of I terms in another order than the reference's: a few units of 2**-24 of the largest.
FP32 = 2e-6


def arguments(batch, queries, keys, heads, width, dtype, *, scaled, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q = normal(batch, queries, heads, width).astype(dtype)
    k = normal(batch, keys, width).astype(dtype)
    scale = jnp.asarray(rng.uniform(0.5, 2.0, (batch, keys)), jnp.float32) if scaled else None
    return q, k, normal(batch, queries, heads), scale


def ragged(batch, queries, keys, seed=0):
    """Windows, empty rows, ranges that reach beyond the keys; whole blocks that see nothing."""
    rng = np.random.default_rng(seed)
    start = rng.integers(-5, keys, (batch, queries))
    end = start + rng.integers(-5, keys // 2, (batch, queries))
    end[:, -queries // 3 :] = 0
    return KeyRange(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32))


CASES = {  # B, T, S, I, H, dtype, k_scale, ranges, tiling, CTAs
    "causal e4m3": (1, 21, 203, 64, 128, "float8_e4m3fn", True, "causal", Tiling(64, 2, 2), 3),
    "ragged, 32 heads of 64": (
        2, 70, 130, 32, 64, "float8_e4m3fn", True, "ragged", Tiling(64, 3, 2), 5,
    ),
    "ragged bf16, 16 heads": (
        1, 41, 70, 16, 128, "bfloat16", False, "ragged", Tiling(128, 2, 1), 2,
    ),
    "less than a tile": (1, 1, 3, 64, 128, "float8_e4m3fn", True, "causal", Tiling(64, 2, 2), 4),
    "one query a row, by shares of the keys": (
        3, 1, 700, 64, 128, "float8_e4m3fn", True, "lengths", Tiling(256, 2, 2, shared=True), 2,
    ),
    "few queries a row, by two consumers": (
        2, 4, 300, 32, 64, "bfloat16", False, "ragged",
        Tiling(256, 2, 1, consumers=2, shared=True), 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_scores(name):
    batch, queries, keys, heads, width, dtype, scaled, kind, tiling, ctas = CASES[name]
    q, k, w, scale = arguments(batch, queries, keys, heads, width, jnp.dtype(dtype), scaled=scaled)
    if kind == "causal":
        ranges = KeyRange.causal(batch, queries, offset=keys - queries)
    elif kind == "lengths":  # of caches: one full, one empty
        end = jnp.linspace(keys, 0, batch).astype(jnp.int32)[:, None]
        ranges = KeyRange(jnp.zeros_like(end), end)
    else:
        ranges = ragged(batch, queries, keys)
    found = scores_sm90.indexer_scores(
        q, k, w, ranges, scale,
        tiling=tiling, ctas=ctas, interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    want = reference.indexer_scores(q, k, w, ranges, scale, workspace_bytes=2**28)
    assert not interpret_pallas_call.get_races().races_found
    found, want = np.asarray(found), np.asarray(want)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(want))
    seen = np.isfinite(want)
    assert np.abs(found[seen] - want[seen]).max() <= FP32 * np.abs(want[seen]).max() * heads**0.5


@pytest.mark.parametrize("seed", range(4))
def test_shares_cover_what_is_seen(seed):
    """Every visible pair lies in a live tile, shares are equal to one tile, and none overlap."""
    rng = np.random.default_rng(seed)
    batch, block, keys, tile = 2, 8, int(rng.integers(1, 3000)), 64 << seed % 2
    blocks, ctas = int(rng.integers(1, 40)), int(rng.integers(1, 140))
    ranges = ragged(batch, blocks * block, keys, seed)
    cut = jax.jit(tile_shares.cut, static_argnames=("block", "tile", "keys", "ctas"))
    bounds = (jnp.clip(x, 0, keys) for x in ranges)
    shares = cut(*bounds, block=block, tile=tile, keys=keys, ctas=ctas)
    owners = np.zeros((batch * blocks, -(-keys // tile)), int)
    sizes = []
    walk = jax.jit(over_share, static_argnames=("ctas", "blocks"))
    for cta in range(ctas):
        n, steps, lows, highs = walk(shares, cta, ctas=ctas, blocks=batch * blocks)
        sizes.append(int(steps))
        assert ((np.asarray(highs) > np.asarray(lows)).sum()) == n
        for i, (low, high) in enumerate(zip(lows, highs, strict=True)):
            owners[i, int(shares.first[i]) + int(low) : int(shares.first[i]) + int(high)] += 1
    assert max(sizes) - min(sizes) <= 1
    assert owners.max() == 1
    assert (owners.sum(axis=1) >= 1).all()
    seen = np.asarray(ranges.mask(keys)).reshape(batch * blocks, block, keys).any(axis=1)
    seen = np.pad(seen, ((0, 0), (0, -keys % tile))).reshape(batch * blocks, -1, tile).any(axis=2)
    assert (owners >= seen).all()


def over_share(shares, cta, *, ctas: int, blocks: int):
    """What `over_blocks` visits: tiles `[low, high)` of each block; and its counts."""
    shares = jax.tree.map(jax.new_ref, shares)
    lows, highs = (jax.new_ref(jnp.zeros(blocks, jnp.int32)) for _ in range(2))

    def visit(i, block, tiles, low, high, step):
        lows[block], highs[block] = low, high

    n, steps = tile_shares.over_blocks(shares, cta, ctas, visit)
    return n, steps, lows[...], highs[...]


@pytest.mark.parametrize(
    ("change", "word"),
    [({"heads": 8}, "I = 8"), ({"width": 96}, "H = 96"), ({"dtype": jnp.float32}, "float32")],
)
def test_unsupported(change, word):
    shape = {"heads": 64, "width": 128, "dtype": jnp.bfloat16} | change
    q, k, w, _ = arguments(1, 2, 4, **shape, scaled=False)
    with pytest.raises(UnsupportedError, match=word):
        indexer_scores(q, k, w, KeyRange.causal(1, 2), implementation="mosaic")


@pytest.mark.parametrize("what", ["scores", "selection"])
def test_lowers_for_cuda_without_a_gpu(what):
    """One after another in a batch row's windows, sharded over a mesh, and under vmap."""
    q, k, w, _ = arguments(2, 40, 640, 64, 128, jnp.float8_e4m3fn, scaled=False)

    def op(q, k, w):
        ranges = KeyRange.causal(*q.shape[:2])
        if what == "scores":
            return indexer_scores(q, k, w, ranges, implementation="mosaic")
        options = dict(topk=16, implementation="mosaic", workspace_bytes=2**16)
        return lightning_indexer(q, k, w, ranges, **options).indices

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    for fn in (op, jax.shard_map(op, mesh=mesh, in_specs=spec, out_specs=spec)):
        text = jax.jit(fn).trace(q, k, w).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
    text = jax.jit(jax.vmap(op)).trace(q[None], k[None], w[None])
    assert "mosaic_gpu" in text.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("seed", range(20))
def test_windows_fit_the_workspace(seed):
    """Whole blocks, as few windows as fit, the last no more than a block per window short."""
    rng = np.random.default_rng(seed)
    batch, queries, keys = (int(rng.integers(1, n)) for n in (4, 5000, 9000))
    block, workspace_bytes = 8, int(2 ** rng.uniform(10, 30))
    window = selection_sm90.window_queries(
        batch, queries, keys, block=block, workspace_bytes=workspace_bytes
    )
    windows = -(-queries // window)
    assert window == queries or window % block == 0
    fits = max(workspace_bytes // (4 * batch * keys * block), 1) * block
    assert window <= fits
    assert windows == -(-queries // fits) or windows * window - queries < block * windows
