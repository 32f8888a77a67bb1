"""On a Hopper GPU the model selects with the kernels, and selects what plain XLA selects."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import filled, tokens_of

from dsa_jax import presets
from pallas_kernels import dispatch, indexer_scores, lightning_indexer
from tests.pallas_kernels.selection_margin import MARGIN, differences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not dispatch.hopper_is_default(), reason="needs a Hopper GPU"),
]

LENGTH, TOPK = 700, 64


def config_of(name):
    """A small model whose indexer has heads as the kernels take them."""
    config = presets.get(name).replace(
        index_n_heads=16, index_topk=TOPK, max_position_embeddings=1024
    )
    return config if config.index_head_dim == 128 else config.replace(index_head_dim=64)


@pytest.mark.parametrize("name", ["tiny-fp8", "tiny"])
def test_sparse_attention_selects_as_xla_does(name, monkeypatch):
    """On the same quantised queries and keys, layer by layer.

    The kernels and XLA round a score differently, so keys may change places whose scores lie within
    a margin of the K-th best (`selection_margin`); no other may.
    """
    config = config_of(name)
    model = filled(config, dtype=jnp.bfloat16)
    tokens = tokens_of(config, 2, LENGTH)
    ids = np.stack([np.repeat([1, 2, 0], [500, 180, 20]), np.repeat([1, 2], [90, 610])])

    def run(tokens):
        def index(state):
            return state._replace(q=None, kv=None, scale=None)

        return model(tokens, segment_ids=jnp.asarray(ids), attention="sparse", probe=index)

    kernels = jax.jit(run)
    assert "dsa_indexer_scores" in kernels.lower(tokens).as_text()
    states = kernels(tokens).probe
    monkeypatch.setattr(dispatch, "hopper_is_default", lambda: False)
    plain = jax.jit(lambda tokens: run(tokens))
    assert "dsa_indexer_scores" not in plain.lower(tokens).as_text()
    first = plain(tokens).probe.selection.indices[0]

    dtype = "float8_e4m3fn" if name == "tiny-fp8" else "bfloat16"
    for layer in range(config.num_hidden_layers):
        s = jax.tree.map(operator.itemgetter(layer), states)
        assert s.index_q.dtype == dtype
        wide = s.index_q.astype(jnp.float32), s.index_k.astype(jnp.float32)
        rest = {"k_scale": s.index_k_scale, "implementation": "xla"}
        exact = indexer_scores(*wide, s.index_w, s.ranges, **rest)
        found = s.selection.indices
        assert (np.asarray(found) == -1).any()
        assert differences(found, exact, TOPK, MARGIN[dtype]).beyond == 0
        by_xla = lightning_indexer(
            s.index_q, s.index_k, s.index_w, s.ranges, topk=TOPK, **rest
        ).indices
        assert differences(by_xla, exact, TOPK, MARGIN[dtype]).beyond == 0
        # So few keys are that close: nearly every row is equal to the last key.
        assert (np.asarray(found) == np.asarray(by_xla)).all(axis=-1).mean() > 0.98
        if layer == 0:  # the same inputs in both runs
            assert (np.asarray(found) == np.asarray(first)).all(axis=-1).mean() > 0.98
