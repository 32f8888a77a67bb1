"""The warm-up loss's kernels in GPU interpret mode with race detection (ring 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import KeyRange, UnsupportedError, indexer_kl_dense, indexer_kl_dense_loss
from pallas_kernels.dense_attention import reference as dense_attention
from pallas_kernels.indexer_loss import dense_sm90, reference

SCALE = 0.125


def arguments(batch, queries, keys, heads, width=64, index_width=64, index_heads=64):
    rng = np.random.default_rng(queries)

    def normal(*shape, dtype=jnp.bfloat16):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)

    iq, ik = normal(batch, queries, index_heads, index_width), normal(batch, keys, index_width)
    iw = normal(batch, queries, index_heads, dtype=jnp.float32) / 8  # of either sign
    q, k = normal(batch, queries, heads, width), normal(batch, keys, heads, width)
    start = rng.integers(0, keys // 2, (batch, queries))
    end = start + rng.integers(1, keys, (batch, queries))
    end[:, queries // 2] = 0
    ranges = KeyRange(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32))
    _, lse = dense_attention.forward(q, k, k, ranges, scale=SCALE, workspace_bytes=2**28)
    return iq, ik, iw, q, k, lse, ranges, normal(batch, queries, dtype=jnp.float32)


def test_value_and_gradient():
    inputs = arguments(1, 19, 140, 2)  # an odd number of queries; two tiles of keys
    kl, gradient = dense_sm90.run(
        *inputs, scale=SCALE, workspace_bytes=2**17, ctas=2,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    assert not interpret_pallas_call.get_races().races_found
    options = dict(scale=SCALE, workspace_bytes=2**28)
    # fp32 sums in another order, of terms as large as a few nats.
    want = reference.dense_forward(*inputs[:7], **options)
    np.testing.assert_allclose(kl, want, rtol=2e-6, atol=2e-6)
    want = reference.dense_backward(*inputs, **options)
    for x, y in zip(gradient, want, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        # The gradient of the scores is rounded to bf16, and again times the weight.
        assert np.linalg.norm(x - y) / np.linalg.norm(y) < 6e-3


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"index_heads": 32}, "I = 32"),
        ({"index_width": 96}, "H = 96"),
        ({"width": 72}, "P\\+R = 72"),
    ],
)
def test_unsupported(change, word):
    inputs = arguments(1, 2, 4, 1, **change)[:7]
    with pytest.raises(UnsupportedError, match=word):
        indexer_kl_dense(*inputs, scale=SCALE, implementation="mosaic")


def test_lowers_for_cuda_without_a_gpu():
    """Loss and gradient in windows: plain and sharded over a mesh; the target is built once."""
    *arrays, ranges, _ = arguments(2, 600, 640, 1)

    def loss(indexer, target, ranges):
        return indexer_kl_dense_loss(
            *indexer, *target, ranges, jnp.ones(ranges.start.shape) / 600,
            scale=SCALE, implementation="mosaic", workspace_bytes=2**21,
        )  # fmt: skip

    arguments_of = (arrays[:3], arrays[3:], ranges)
    value = jax.jit(loss).trace(*arguments_of).lower(lowering_platforms=("cuda",)).as_text()
    targets = value.count("dsa_indexer_target")
    assert targets
    assert not value.count("dsa_indexer_gradient")
    op = jax.grad(loss)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    for fn in (op, jax.shard_map(op, mesh=mesh, in_specs=spec, out_specs=spec)):
        text = jax.jit(fn).trace(*arguments_of).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("dsa_indexer_target") == targets


def test_loss_is_the_weighted_sum():
    """On any back end: value, gradient, and a factor from outside."""
    *arrays, ranges, weights = arguments(2, 6, 12, 2, index_heads=4)
    options = dict(scale=SCALE, implementation="xla")

    def plain(indexer):
        return 3 * (weights * indexer_kl_dense(*indexer, *arrays[3:], ranges, **options)).sum()

    def at_once(indexer):
        return 3 * indexer_kl_dense_loss(*indexer, *arrays[3:], ranges, weights, **options)

    indexer = [x.astype(jnp.float32) for x in arrays[:3]]
    want, want_gradient = jax.value_and_grad(plain)(indexer)
    found, gradient = jax.value_and_grad(at_once)(indexer)
    # The same fp32 sums, scaled by the rows' weights before or after them.
    np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_allclose(at_once(indexer), want, rtol=1e-6)
    for x, y in zip(gradient, want_gradient, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
