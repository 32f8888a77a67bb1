"""Small models whose every parameter matters, without the cost of compiling an initialiser."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsa_jax.config import ModelConfig
from dsa_jax.plan import layer_plan
from dsa_jax.transformer import Transformer

# These tests compile far longer than they run: LLVM need not try hard.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def filled(config: ModelConfig, *, seed: int = 0, dtype: Any = jnp.float32, **options: Any):
    """A model of lively random weights: norms off 1, biases off 0, scores far from uniform."""
    return fill(
        nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, **options)),
        seed=seed,
    )


def fill(shapes: Any, *, seed: int = 0):
    """The same for any module's shapes."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        noise = rng.standard_normal(x.shape)
        if "norm" in name:
            value = 0.3 * noise + (0 if "bias" in name else 1)
        elif "e_score_correction_bias" in name:
            value = 0.6 * noise - 1.0  # sigmoid + bias is often below zero
        elif "embed" in name:
            value = noise
        else:
            value = 1.2 * noise * x.shape[-2] ** -0.5
        return jnp.asarray(value, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def layer_params(model: Transformer) -> list[dict[str, Any]]:
    """Every layer's parameters as float64 arrays by dotted name, in layer order."""
    layers: list[dict[str, Any]] = [{} for _ in range(model.config.num_hidden_layers)]
    for s, plan in enumerate(layer_plan(model.config)):
        for u, block in enumerate(model.stacks[s].blocks):
            for path, x in jax.tree_util.tree_flatten_with_path(block)[0]:
                name = ".".join(str(k.name) for k in path[:-1])
                for r in range(plan.repeats):
                    layers[plan.layer(u, r)][name] = np.asarray(x[r], np.float64)
    return layers


def tokens_of(config: ModelConfig, batch: int, length: int, seed: int = 1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, config.vocab_size)
