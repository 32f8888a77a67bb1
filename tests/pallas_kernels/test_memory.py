"""No op's temporary memory grows with T: the compiler's own account, at long context."""

import functools

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as ops
from pallas_kernels import KeyRange, Selection

MIB = 2**20


class Shapes:
    """Abstract arguments; nothing here is ever allocated."""

    def __init__(self, batch, length, heads, dtype, topk):
        def array(*shape, dtype=dtype):
            return jax.ShapeDtypeStruct((batch, length, *shape), dtype)

        self.ranges = KeyRange(array(dtype=jnp.int32), array(dtype=jnp.int32))
        self.selection = Selection(array(topk, dtype=jnp.int32))
        self.scores = array(length, dtype=jnp.float32)
        self.iq, self.ik = array(64, 128), array(128)
        self.iw = array(64, dtype=jnp.float32)
        self.q, self.kv = array(heads, 576), array(576)
        self.qd, self.k, self.v = array(heads, 192), array(heads, 192), array(heads, 128)
        self.lse = array(heads, dtype=jnp.float32)
        self.pages = jax.ShapeDtypeStruct((batch * length // 64, 64, 576), dtype)
        self.topk = topk


def calls(s: Shapes):
    """Op -> (function of its array arguments, the arguments, how many are differentiable)."""
    bind = functools.partial
    scaled = {"scale": 0.1}
    attend = {"scale": 0.1, "value_width": 512}

    def decode(q, pages, selection, **options):
        return ops.sparse_attention_decode(q, pages, selection.indices, **attend, **options)

    indexer = (s.iq, s.ik, s.iw)
    return {
        "lightning_indexer": (bind(ops.lightning_indexer, topk=s.topk), (*indexer, s.ranges), 0),
        "indexer_scores": (ops.indexer_scores, (*indexer, s.ranges), 3),
        "select_topk": (bind(ops.select_topk, topk=s.topk), (s.scores, s.ranges), 0),
        "sparse_attention": (bind(ops.sparse_attention, **attend), (s.q, s.kv, s.selection), 2),
        "sparse_attention_decode": (decode, (s.q, s.pages, s.selection), 0),
        "dense_attention": (bind(ops.dense_attention, **scaled), (s.qd, s.k, s.v, s.ranges), 3),
        "indexer_kl_dense": (
            bind(ops.indexer_kl_dense, **scaled),
            (*indexer, s.qd, s.k, s.lse, s.ranges),
            3,
        ),
        "indexer_kl_sparse": (
            bind(ops.indexer_kl_sparse, **scaled),
            (*indexer, s.q, s.kv, s.lse, s.selection),
            3,
        ),
    }


NAMES = list(calls(Shapes(1, 64, 1, jnp.float32, 1)))
# At the lengths of long-context training with the default budget; and a batch with a small budget,
# where rows and heads are cut as well.
SIZES = {
    "32K": ({"batch": 1, "length": 32768, "heads": 2, "dtype": jnp.bfloat16, "topk": 2048}, 512),
    "batch": ({"batch": 3, "length": 4096, "heads": 8, "dtype": jnp.float32, "topk": 128}, 64),
}


def temporary_bytes(function, *arguments) -> int:
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_forward(name, size):
    shapes, budget = SIZES[size]
    op, arguments, _ = calls(Shapes(**shapes))[name]
    op = functools.partial(op, implementation="xla", workspace_bytes=budget * MIB)
    assert temporary_bytes(op, *arguments) <= budget * MIB


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", [n for n in NAMES if calls(Shapes(1, 64, 1, jnp.float32, 1))[n][2]]
)
def test_backward(name, size):
    shapes, budget = SIZES[size]
    op, arguments, differentiable = calls(Shapes(**shapes))[name]

    def pull_back(*arguments):
        some, rest = arguments[:differentiable], arguments[differentiable:]
        options = {"implementation": "xla", "workspace_bytes": budget * MIB}
        return jax.vjp(lambda *some: op(*some, *rest, **options), *some)

    results, pull = jax.eval_shape(pull_back, *arguments)  # the residuals are inputs
    assert temporary_bytes(lambda pull, g: pull(g), pull, results) <= budget * MIB
