"""The model under Flax's coming defaults: modules as trees, no graph (`NNX_GRAPH_MODE=false`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from small_models import filled, jit, tokens_of

from dsa_jax import presets
from dsa_jax.cache import init_cache


def everything_a_caller_does() -> dict[str, float]:
    """Builds (in shapes), splits, merges, differentiates, decodes; a few numbers of each."""
    config = presets.get("tiny-shared").replace(num_hidden_layers=3, first_k_dense_replace=0)
    tokens = tokens_of(config, 2, 24)
    model = filled(config)
    graph, indexers, rest = nnx.split(model, lambda path, _: "indexer" in path, ...)

    @jit
    def run(indexers, rest, tokens):
        def loss(indexers, rest):
            out = nnx.merge(graph, indexers, rest)(tokens, indexer_loss="sparse")
            return out.logits.std() + out.kl.sum()

        value, gradients = jax.value_and_grad(loss, (0, 1))(indexers, rest)
        merged = nnx.merge(graph, indexers, rest)
        cache = init_cache(config, 2, 32, jnp.float32)
        decoded = merged(tokens[:, :1], cache=cache)
        norms = [sum(jnp.abs(g).sum() for g in jax.tree.leaves(part)) for part in gradients]
        return value, *norms, decoded.logits.std(), decoded.cache.lengths.sum()

    names = ("loss", "indexer gradient", "other gradient", "decoded", "length")
    numbers = run(indexers, rest, tokens)
    leaves = {"parameters": len(jax.tree.leaves(model))}
    return leaves | {name: float(x) for name, x in zip(names, numbers, strict=True)}


def test_same_numbers_in_the_other_mode():
    now = flax.config.nnx_graph_mode
    mode = str(not now).lower()
    env = os.environ | {"NNX_GRAPH_MODE": mode, "NNX_GRAPH_UPDATES": mode, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    env["PYTHONPATH"] = os.pathsep.join([str(root), str(Path(__file__).parent)])
    code = (
        "import json, flax, test_nnx_modes as t;"
        "print(json.dumps([flax.config.nnx_graph_mode, t.everything_a_caller_does()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    set_mode, numbers = json.loads(done.stdout.splitlines()[-1])
    assert set_mode is not now
    expected = everything_a_caller_does()
    assert numbers == pytest.approx(expected, rel=1e-6)  # other device counts sum alike
    assert numbers["length"] == 2
    assert numbers["indexer gradient"] > 0
