"""What transformers computed once, from weights drawn again here: parity without torch.

`python -m tests.parity.record` made the file.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import Numerics
from pallas_kernels import Selection
from tests.oracle.named_weights import LENGTH, build, configs

GOLDEN = Path(__file__).with_name("golden.npz")
# fp32, sums in other orders, through three to nine layers: greatest difference over greatest value.
# In the parity tests the most seen is 4e-6.
MODEL = 1e-4


@pytest.fixture(scope="module")
def golden():
    assert GOLDEN.stat().st_size < 200_000
    with np.load(GOLDEN) as file:
        return dict(file)


@functools.cache
def forward(name):
    """Our model, its last logits and selected keys, its loss and the norm of the gradient."""
    config = configs()[name]
    # latent_norm_eps: transformers has 1e-6 in GLM too.
    model = build(config.replace(numerics=Numerics.transformers(), latent_norm_eps=1e-6))
    attention = "sparse" if config.has_indexer else "dense"

    def run(model, tokens):
        def loss(model):
            out = model(tokens, attention=attention, return_selection=attention == "sparse")
            logp = jax.nn.log_softmax(out.logits[:, :-1])
            loss = -jnp.take_along_axis(logp, tokens[:, 1:, None], -1).mean()
            return loss, (out.logits[:, -8:], out.selection)

        (value, made), gradient = jax.value_and_grad(loss, has_aux=True)(model)
        squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)]
        return value, jnp.sqrt(sum(squares)), *made

    # Compiling takes longer than running: LLVM need not try hard.
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    with np.load(GOLDEN) as file:
        return run(model, jnp.asarray(file[f"{name}/tokens"]))


@pytest.mark.parametrize("name", configs())
def test_logits_loss_and_gradient(name, golden):
    loss, norm, logits, _ = forward(name)
    expected = golden[f"{name}/logits"]
    assert np.abs(logits - expected).max() < MODEL * np.abs(expected).max()
    # A mean over all tokens: the differences of single logits average out.
    assert float(loss) == pytest.approx(float(golden[f"{name}/loss"]), rel=1e-5)
    assert float(norm) == pytest.approx(float(golden[f"{name}/gradient_norm"]), rel=MODEL)


@pytest.mark.parametrize("name", [n for n, c in configs().items() if c.has_indexer])
def test_selected_keys(name, golden):
    selection = forward(name)[3]
    expected = np.unpackbits(golden[f"{name}/selected"], axis=-1, count=LENGTH).astype(bool)
    for layer, indices in enumerate(selection.indices):
        np.testing.assert_array_equal(Selection(indices).mask(LENGTH), expected[layer])
        assert expected[layer, 0, -1].sum() == configs()[name].index_topk
