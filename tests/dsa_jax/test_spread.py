"""Orders of tokens, sums of gradients, and what a mesh refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import jit

from dsa_jax import spread
from dsa_jax.sharding import MeshConfig, Rules, make_mesh

RULES = Rules()


def test_zigzag_by_hand():
    x = jnp.arange(16)[None]
    order = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    assert spread.to_zigzag(x, 4)[0].tolist() == order
    assert spread.from_zigzag(spread.to_zigzag(x, 4), 4)[0].tolist() == list(range(16))


@pytest.mark.parametrize("sizes", [{"context": 8}, {"context": 2, "tensor": 2}, {"tensor": 2}])
def test_the_models_exit_undoes_its_entrance(sizes):
    x = jnp.arange(2 * 32 * 3.0).reshape(2, 32, 3)

    def there_and_back(x):
        inside = spread.in_zigzag(x, RULES)
        return inside, spread.in_natural_order(inside, RULES)

    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
        inside, back = jax.jit(there_and_back)(x)
    assert not np.array_equal(inside, x)
    np.testing.assert_array_equal(back, x)


def test_keys_gradients_are_summed_in_fp32():
    """Eight devices' bf16 gradients: rounded once, after the sum."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 64, 4)), jnp.bfloat16)
    g = jnp.asarray(rng.standard_normal((8, 64, 4)), jnp.bfloat16)

    def total(x):
        def local(x, g):
            keys = spread.all_keys(x, ("context",), 8)
            return jax.lax.psum((keys * g).astype(jnp.float32).sum(), "context")

        # The gradient of all keys that a device has is its row of g.
        return spread.per_device(local, RULES, ("_ T _", "T _ _"), "")(x, g)

    with jax.set_mesh(make_mesh(MeshConfig(context=8))):
        found = jit(jax.grad(total))(x)
        # A CPU would sum bf16 in fp32 too, a GPU would not.
        text = jax.jit(jax.grad(total)).lower(x).as_text()
    sums = re.findall(r"reduce_scatter.*?\) -> (tensor<\S+>)", text, re.DOTALL)
    assert sums == ["tensor<1x8x4xf32>"]
    exact = spread.to_zigzag(g.astype(jnp.float32).sum(0)[None], 8)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_a_weights_gradient_is_cut_as_the_weight_is():
    """Also where nothing else says how: `jax.grad` without a train step around it."""
    w, x = jnp.ones((16, 8)), jnp.arange(8 * 2 * 16.0).reshape(8, 2, 16)

    def loss(w, x):
        return (spread.pinned(x, RULES, "B T _") @ spread.whole(w, RULES, "D _")).sum()

    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, expert=2, context=2))):
        found = jax.jit(jax.grad(loss))(w, x)
    assert found.addressable_shards[0].data.shape == (2, 8)
    np.testing.assert_array_equal(found, np.repeat(np.asarray(x).sum((0, 1))[:, None], 8, axis=1))


def test_without_a_mesh_nothing_happens():
    assert spread.mesh_sizes() == {}
    assert spread.per_device(sum, RULES, "B", "B") is sum
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, context=2))):
        assert spread.mesh_sizes() == {"fsdp": 2, "context": 2}
        assert spread.axes_of(RULES, "E") == ("context",)


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((3, 16), r"B=3, which does not divide by mesh.data=2 x mesh.expert=2; choose a multiple"),
        ((4, 10), r"T=10, .* mesh.context=2 x 2 .*choose a multiple of 4"),
    ],
)
def test_batches_that_do_not_divide_are_refused(shape, complaint):
    mesh = make_mesh(MeshConfig(data=2, expert=2, context=2))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=complaint):
        spread.check_batch(shape, RULES)
