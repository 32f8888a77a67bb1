"""The leaf gradient: right, isolated, and free of activations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import filled, jit, tokens_of

import dsa_jax.indexer_loss
from dsa_jax import presets
from dsa_jax.indexer_loss import leaf_loss, mean_over_rows
from dsa_jax.transformer import Transformer
from pallas_kernels import KeyRange

CONFIG = presets.get("tiny").replace(first_k_dense_replace=0)


def plain_loss(loss, params, inputs):
    """What `leaf_loss` replaces: ordinary differentiation."""
    return loss(params, jax.lax.stop_gradient(inputs))


def test_leaf_loss_by_hand():
    def loss(w, x):
        return (w["a"] * x).sum() ** 2

    w, x = {"a": jnp.array([1.0, 2.0])}, jnp.array([3.0, 4.0])
    value, gradient = jax.value_and_grad(lambda w: 5 * leaf_loss(loss, w, x))(w)
    assert value == 5 * 11**2
    np.testing.assert_allclose(gradient["a"], 5 * 2 * 11 * x)
    assert not jax.grad(lambda x: leaf_loss(loss, w, x))(x).any()


def test_mean_is_over_rows_that_see_a_key():
    kl = jnp.array([[1.0, 2.0, 100.0], [6.0, 50.0, 50.0]])
    ranges = KeyRange(jnp.array([[0, 0, 2], [0, 1, 2]]), jnp.array([[1, 2, 2], [1, 1, 0]]))
    assert mean_over_rows(kl, ranges) == 3.0
    assert mean_over_rows(kl, KeyRange(ranges.end, ranges.end)) == 0.0  # no row at all


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_equal_to_ordinary_differentiation(attention, monkeypatch):
    tokens = tokens_of(CONFIG, 2, 24)
    weights = jnp.array([1.0, -2.0])  # layers weighed unequally: the cotangent arrives

    def gradient():
        def loss(model):
            out = model(tokens, attention=attention, indexer_loss=attention)
            return (out.kl * weights).sum()

        return jit(jax.grad(loss))(filled(CONFIG.replace(num_hidden_layers=2)))

    ours = gradient()
    monkeypatch.setattr(dsa_jax.indexer_loss, "leaf_loss", plain_loss)
    # Entries are sums over rows that can cancel, of gradients up to 0.2: fp32 leaves 1e-8.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, gradient()
    )


@functools.cache
def warmup_program(layers, remat="none"):
    """The gradient of the warm-up loss with respect to the indexers alone, compiled."""
    config = CONFIG.replace(num_hidden_layers=layers)
    shapes = nnx.eval_shape(
        lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=remat)
    )
    graph, indexers, rest = nnx.split(shapes, lambda path, _: "indexer" in path, ...)

    def loss(indexers, rest, tokens):
        model = nnx.merge(graph, indexers, rest)
        return model(tokens, attention="dense", indexer_loss="dense").kl.sum()

    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    compiled = jit(jax.grad(loss)).lower(indexers, rest, tokens).compile()
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes, memory.output_size_in_bytes, compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_warmup_keeps_no_activations(remat):
    """Eight more layers cost their indexers' gradient, which is the result; nothing else."""
    few, few_out, _ = warmup_program(2, remat)
    many, many_out, _ = warmup_program(10, remat)
    assert many - few <= 1.01 * (many_out - few_out)
    # One layer boundary of activations would be this much; there is less for all eight together.
    assert many - few < 8 * 2 * 256 * CONFIG.hidden_size * 4


def test_that_test_can_fail(monkeypatch):
    monkeypatch.setattr(dsa_jax.indexer_loss, "leaf_loss", plain_loss)
    few, few_out, _ = warmup_program.__wrapped__(2)
    many, many_out, _ = warmup_program.__wrapped__(10)
    assert many - few > 10 * (many_out - few_out)


def test_remat_computes_the_loss_once():
    """Its gradient is saved by name, so that recomputation has nothing to do in this stage."""
    assert warmup_program(2, "full")[2] == pytest.approx(warmup_program(2, "none")[2], rel=0.01)


def test_a_loss_may_work_on_a_ref_in_a_scan():
    """As kernels do whose gradient adds up in place."""

    @jax.custom_vjp
    def square(w, x):
        return ((x * w) ** 2).sum()

    @jax.jit
    def pull(residuals, g):
        w, x = residuals
        sums = jax.new_ref(jnp.zeros_like(x))
        sums[:2] = 2 * w * x[:2] ** 2
        sums[2] = 2 * w * x[2] ** 2
        return g * jax.freeze(sums).sum(), None

    square.defvjp(lambda w, x: (square(w, x), (w, x)), pull)

    def layer(x, w):
        return jnp.sin(x), leaf_loss(square, w, x)

    x, w = jnp.arange(3.0) + 1, jnp.array([1.0, 2.0])
    for step in (layer, jax.checkpoint(layer)):
        gradient = jax.jit(jax.grad(lambda w, step=step: jax.lax.scan(step, x, w)[1].sum()))(w)
        expected = 2 * w * jnp.stack([(x**2).sum(), (jnp.sin(x) ** 2).sum()])
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)
