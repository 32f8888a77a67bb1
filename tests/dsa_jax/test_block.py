"""One layer: where the residual stream is rounded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small_models import jit

from dsa_jax import presets
from dsa_jax.block import Block, residual_dtype
from dsa_jax.mla import Mode, Rows
from dsa_jax.plan import LayerKind
from dsa_jax.rope import rotation
from pallas_kernels import KeyRange

CONFIG = presets.get("tiny").replace(numerics=dataclasses.replace(presets.get("tiny").numerics))


def make(config):
    rngs = nnx.Rngs(params=0, indexer=1)
    return Block(
        config, LayerKind(False, True), rngs=rngs, dtype=jnp.bfloat16, param_dtype=jnp.float32
    )


def rows():
    positions = jnp.arange(6)[None]
    return Rows(rotation(CONFIG, positions), KeyRange.causal(1, 6), jnp.ones((1, 6), bool), None)


def test_norm_reads_the_sum_before_it_is_rounded():
    """s = bf16(h) + attention in fp32; the MLP's norm reads s, the next residual is bf16(s)."""
    h = 3 * jax.random.normal(jax.random.key(0), (1, 6, 48), jnp.float32)
    mode = Mode("dense", select=False)
    wide = lambda x: np.asarray(x, np.float32)  # noqa: E731

    for rounded in (False, True):
        numerics = dataclasses.replace(CONFIG.numerics, round_residual=rounded)
        config = CONFIG.replace(numerics=numerics)
        block = make(config)
        dtype = residual_dtype(config, jnp.bfloat16)
        assert dtype == (jnp.bfloat16 if rounded else jnp.float32)
        start = h.astype(dtype)
        out = jit(lambda block, h: block(h, rows(), mode, jnp.int32(0)))(block, start)
        x = block.input_layernorm(start)
        update = jit(lambda a, x: a(x, rows(), mode, jnp.int32(0)).out)(block.self_attn, x)
        s = jnp.asarray(wide(start.astype(jnp.bfloat16)) + wide(update), dtype)
        update = jit(lambda mlp, x: mlp(x))(block.mlp, block.post_attention_layernorm(s))
        expected = jnp.asarray(wide(s.astype(jnp.bfloat16)) + wide(update), dtype)
        np.testing.assert_array_equal(wide(out.h), wide(expected))
        assert out.h.dtype == dtype


def test_the_rest_starts_equal_without_an_indexer():
    """A graft changes the indexer's parameters only."""
    options = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    blocks = [
        Block(CONFIG, LayerKind(True, has), rngs=nnx.Rngs(params=0, indexer=1), **options)
        for has in (True, False)
    ]
    leaves = [
        {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_flatten_with_path(b)[0]}
        for b in blocks
    ]
    assert len(leaves[0]) == len(leaves[1]) + 5
    for name, x in leaves[1].items():
        np.testing.assert_array_equal(leaves[0][name], x, err_msg=name)
