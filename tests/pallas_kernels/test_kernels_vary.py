"""Inside `shard_map`, what a kernel returns varies over the axes that its inputs vary over.

A kernel itself does not say so. If the op did not either, the result would count as equal on all
devices, and its gradient would be summed over them. Tracing shows it; nothing runs here.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dsa_jax.grouped_matmul import grouped_matmul
from pallas_kernels import KeyRange, Selection, dense_attention, dispatch, sparse_attention

T, S, N = 64, 256, 64
BF16 = jnp.bfloat16


def _sparse():
    shapes = ((1, T, N, 576), BF16), ((1, S, 576), BF16), ((1, T, 128), jnp.int32)

    def op(q, kv, indices):
        return sparse_attention(q, kv, Selection(indices), value_width=512, scale=0.1)

    return op, shapes, 2


def _dense():
    shapes = ((1, T, N, 192), BF16), ((1, S, N, 192), BF16), ((1, S, N, 128), BF16)

    def op(q, k, v):
        return dense_attention(q, k, v, KeyRange.causal(1, T, offset=S - T), scale=0.1)

    return op, shapes, 3


def _grouped():
    shapes = ((512, 256), BF16), ((4, 256, 128), BF16), ((4,), jnp.int32)
    return grouped_matmul, shapes, 2


@pytest.mark.parametrize("case", [_sparse, _dense, _grouped])
def test_results_and_gradients_vary_with_the_inputs(case):
    op, shapes, differentiable = case()
    mesh = jax.make_mesh((2,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = []

    def local(*arguments):
        out, pullback = jax.vjp(lambda *x: op(*x, *arguments[differentiable:]),
                                *arguments[:differentiable])  # fmt: skip
        seen.extend(jax.tree.leaves(out))
        seen.extend(pullback(jax.tree.map(jnp.ones_like, out)))
        return jax.tree.map(lambda x: x.astype(jnp.float32).sum()[None], out)

    run = jax.shard_map(local, mesh=mesh, in_specs=P("context"), out_specs=P("context"))
    whole = [jax.ShapeDtypeStruct((2 * s[0], *s[1:]), dtype) for s, dtype in shapes]
    with dispatch.kernels(True), dispatch.recorded() as chosen:
        jax.eval_shape(run, *whole)
    assert set(chosen.values()) == {"mosaic"}, chosen
    assert all(jax.typeof(x).manual_axis_type.varying == {"context"} for x in seen), [
        jax.typeof(x) for x in seen
    ]
