"""The dense attention kernels in GPU interpret mode with race detection (ring 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import KeyRange, UnsupportedError, dense_attention
from pallas_kernels.dense_attention import backward_sm90, forward_sm90, key_tiles, reference

# P and dS are rounded to bf16 (2**-9 at most) before they are multiplied, the results after.
BF16 = 4e-3
SCALE = 0.1

CASES = {  # B, T, S, N, P+R, V
    "more than a block, ragged keys": (1, 135, 150, 1, 192, 128),
    "fewer queries and keys than a tile": (2, 5, 9, 1, 128, 64),
    "values as wide as keys": (1, 70, 131, 2, 64, 64),
}


def arguments(name):
    batch, queries, keys, heads, width, value_width = CASES[name]
    rng = np.random.default_rng(len(name))

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(jnp.bfloat16)

    q = normal(batch, queries, heads, width)
    k, v = normal(batch, keys, heads, width), normal(batch, keys, heads, value_width)
    # Every query another window; some see nothing, some beyond the keys.
    start = rng.integers(-3, keys // 2, (batch, queries))
    end = start + rng.integers(0, keys, (batch, queries))
    end[:, queries // 2] = 0
    return q, k, v, KeyRange(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32))


def error(found, want):
    found, want = (np.asarray(x, np.float32) for x in (found, want))
    assert np.isfinite(found).all()
    return np.linalg.norm(found - want) / np.linalg.norm(want)


@pytest.mark.parametrize("name", CASES)
def test_forward(name):
    q, k, v, ranges = arguments(name)
    out, lse = forward_sm90.attend(
        q, k, v, ranges, scale=SCALE, interpret=plgpu.InterpretGPUParams(detect_races=True)
    )
    assert not interpret_pallas_call.get_races().races_found
    want, want_lse = reference.forward(q, k, v, ranges, scale=SCALE, workspace_bytes=2**28)
    assert error(out, want) < BF16
    seen = np.asarray(ranges.end > jnp.maximum(ranges.start, 0))
    np.testing.assert_array_equal(np.isfinite(lse).all(axis=2), seen)
    np.testing.assert_array_equal(np.asarray(out, np.float32)[~seen], 0)
    # fp32 scores of a few units, summed in another order.
    np.testing.assert_allclose(lse[seen], want_lse[seen], atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_backward(name):
    q, k, v, ranges = arguments(name)
    rng = np.random.default_rng(0)
    out, lse = reference.forward(q, k, v, ranges, scale=SCALE, workspace_bytes=2**28)
    dout = jnp.asarray(rng.standard_normal(out.shape), jnp.float32).astype(jnp.bfloat16)
    dlse = jnp.asarray(rng.standard_normal(lse.shape), jnp.float32)
    inputs = (q, k, v, ranges, out, lse, dout, dlse)
    found = backward_sm90.gradients(
        *inputs, scale=SCALE, interpret=plgpu.InterpretGPUParams(detect_races=True)
    )
    assert not interpret_pallas_call.get_races().races_found
    want = reference.backward(*inputs, scale=SCALE, workspace_bytes=2**28)
    for x, y in zip(found, want, strict=True):
        assert error(x, y) < BF16


@pytest.mark.parametrize("seed", range(6))
def test_tiles_cover_what_is_seen(seed):
    """Every visible pair lies in a tile of its block, and tiles called whole are seen whole."""
    rng = np.random.default_rng(seed)
    queries, keys = (int(n) for n in rng.integers(1, 400, 2))
    block, tile = 64, 32
    start = rng.integers(-20, keys, (1, queries))
    end = start + rng.integers(-10, keys, (1, queries)) if seed % 2 else start + keys
    ranges = KeyRange(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32))
    seen = np.zeros((-(-queries // block) * block, -(-keys // tile) * tile), bool)
    seen[:queries, :keys] = np.asarray(ranges.mask(keys))[0]
    exists = np.zeros_like(seen)
    exists[:queries] = True
    seen, exists = (x.reshape(-(-queries // block), block, -1, tile) for x in (seen, exists))
    _, tiles = key_tiles.plan(ranges, keys=keys, block=block, tile=tile)
    for i in range(seen.shape[0]):
        work = tiles.at(0, i)
        visited = range(int(work.first), int(work.first + work.count))
        assert set(np.flatnonzero(seen[i].any(axis=(0, 2)))) <= set(visited)
        whole = [bool(work.whole(j)) for j in range(len(visited))]
        assert all(
            (seen | ~exists)[i][:, j].all() for j, yes in zip(visited, whole, strict=True) if yes
        )
    _, by_keys = key_tiles.plan_queries(ranges, keys=keys, block=tile, tile=block)
    for j in range(seen.shape[2]):
        first, count = int(by_keys.first[0, j]), int(by_keys.count[0, j])
        assert set(np.flatnonzero(seen[:, :, j].any(axis=(1, 2)))) <= set(
            range(first, first + count)
        )


@pytest.mark.parametrize(
    ("width", "value_width", "dtype", "word"),
    [
        (72, 64, "bfloat16", "P\\+R = 72"),
        (64, 320, "bfloat16", "V = 320"),
        (64, 64, "float32", "float32"),
    ],
)
def test_unsupported(width, value_width, dtype, word):
    q = jnp.zeros((1, 2, 1, width), dtype)
    v = jnp.zeros((1, 2, 1, value_width), dtype)
    with pytest.raises(UnsupportedError, match=word):
        dense_attention(q, q, v, KeyRange.causal(1, 2), scale=1.0, implementation="mosaic")


def test_lowers_for_cuda_without_a_gpu():
    """With its gradient: plain, sharded over a mesh, and under vmap."""
    q = jnp.zeros((2, 40, 2, 128), jnp.bfloat16)
    v = jnp.zeros((2, 40, 2, 64), jnp.bfloat16)

    def op(q, v):
        ranges = KeyRange.causal(*q.shape[:2])

        def total(q, v):
            out, lse = dense_attention(q, q, v, ranges, scale=1.0, implementation="mosaic")
            return out.astype(jnp.float32).sum() + lse.sum()

        return jax.grad(total, (0, 1))(q, v)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    for fn in (op, jax.shard_map(op, mesh=mesh, in_specs=spec, out_specs=spec)):
        text = jax.jit(fn).trace(q, v).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu") >= 3
    text = jax.jit(jax.vmap(op)).trace(q[None], v[None])
    assert "mosaic_gpu" in text.lower(lowering_platforms=("cuda",)).as_text()
