"""Parameter counts: arithmetic, the model itself, and the published totals."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsa_jax import presets
from dsa_jax.counts import param_count
from dsa_jax.transformer import Transformer


def test_published_totals():
    count = param_count(presets.get("deepseek-v3.2-exp"))
    assert count.main == 671_877_944_064
    assert count.mtp == 13_477_385_728
    assert count.main + count.mtp + count.scales == 685_396_921_376
    assert count.indexer == 61 * 13_959_424


@pytest.mark.parametrize("name", presets.names())
def test_the_model_has_as_many(name):
    """Shapes only: the 671B model is built without an array. glm-5.2 covers shared layers."""
    config = presets.get(name)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    sizes = {jax.tree_util.keystr(path): x.size for path, x in leaves}
    count = param_count(config)
    assert sum(sizes.values()) == count.main
    assert sum(n for name, n in sizes.items() if ".indexer." in name) == count.indexer


def test_fp8_weights_have_scales():
    """An FP8 model stores e4m3 weights, and one scale for each tile the arithmetic counts."""
    config = presets.get("deepseek-v3.2-exp").replace(num_nextn_predict_layers=0)
    model = nnx.eval_shape(
        lambda: Transformer(config, rngs=nnx.Rngs(0), param_dtype=jnp.float8_e4m3fn)
    )
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    scales = sum(x.size for path, x in leaves if "scale" in jax.tree_util.keystr(path))
    rest = sum(x.size for path, x in leaves if "scale" not in jax.tree_util.keystr(path))
    assert scales == param_count(config).scales
    assert rest == param_count(config).main
    dtypes = {jax.tree_util.keystr(path).rsplit(".", 3)[1]: x.dtype for path, x in leaves}
    assert dtypes["kv_b_proj"] == jnp.float8_e4m3fn
    assert dtypes["weights_proj"] == dtypes["embed_tokens"] == jnp.bfloat16
    assert dtypes["k_norm"] == jnp.float32
