"""Without an indexer loss there is nothing of it in the compiled program."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from small_models import jit

from dsa_jax import presets
from dsa_jax.transformer import Transformer

CONFIG = presets.get("tiny").replace(num_hidden_layers=2)
# The functions that compute a divergence or its gradient, as the program's metadata names them.
LOSSES = {
    "dense": ("jit(dense_forward)", "jit(dense_backward)"),
    "sparse": ("jit(sparse_forward)", "jit(sparse_backward)"),
}


def program(attention: str, indexer_loss: str | None, gradient: bool) -> str:
    shapes = nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))

    def loss(model, tokens):
        out = model(tokens, attention=attention, indexer_loss=indexer_loss)
        return (out.logits**2).sum() + (0.0 if out.kl is None else out.kl.sum())

    run = jax.value_and_grad(loss) if gradient else loss
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    return jit(run).lower(shapes, tokens).compile().as_text() or ""


@pytest.mark.parametrize(
    ("attention", "gradient"), [("sparse", False), ("sparse", True), ("dense", True)]
)
def test_no_loss_no_work(attention, gradient):
    text = program(attention, None, gradient)
    assert not any(name in text for names in LOSSES.values() for name in names)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_that_test_can_fail(attention):
    text = program(attention, attention, True)
    assert all(name in text for name in LOSSES[attention])
