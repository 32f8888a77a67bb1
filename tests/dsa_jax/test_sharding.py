"""The mesh, the rules, and a model that computes the same on eight devices as on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import filled, jit, tokens_of

from dsa_jax import presets, sharding
from dsa_jax.sharding import MeshConfig, Rules, make_mesh, param_specs
from dsa_jax.transformer import Transformer


def abstract(config, **options):
    return jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **options))


def test_mesh_axes_are_named_and_auto():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh().size == 1
    assert make_mesh(MeshConfig(fsdp=3)).size == 3  # the first three


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: MeshConfig(data=0), r"mesh.data=0 must be at least 1"),
        (lambda: MeshConfig(expert=-2), r"mesh.expert=-2 must be at least 1"),
        (lambda: MeshConfig(data=-1, fsdp=-1), "mesh.data and mesh.fsdp are both -1"),
        (lambda: make_mesh(MeshConfig(fsdp=16)), "fsdp=16 needs 16 devices, but there are 8"),
        (lambda: make_mesh(MeshConfig(data=-1, fsdp=3)), "8 devices are not a multiple of 3"),
    ],
)
def test_bad_meshes(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_rules():
    assert Rules().spec("BT_") == P(("data", "fsdp", "expert"), ("context",), None)
    assert Rules().spec("E X F") == P(("expert", "context"), "fsdp", "tensor")
    assert dataclasses.replace(Rules(), D=None).spec("W D") == P("tensor", None)


@pytest.mark.parametrize(
    ("rules", "letters", "complaint"),
    [
        (Rules(), "B T D", r"x \[B T D\]: letters B and D are both split over mesh axis 'fsdp'"),
        (Rules(), "F N", r"letters F and N .* 'tensor'.*Rules.F and Rules.N"),
        (Rules(), "B Z", "letter 'Z' has no rule"),
        (Rules(D="rows"), "D", r"Rules.D=\('rows',\): 'rows' is not one of"),
    ],
)
def test_bad_rules(rules, letters, complaint):
    with pytest.raises(ValueError, match=complaint):
        rules.spec(letters, "x")


@pytest.mark.parametrize("preset", presets.names())
def test_every_parameter_has_letters_that_fit(preset):
    # Rules over axes of size 1 never fail to divide: this is about names, ranks and collisions.
    config = presets.get(preset)
    like = abstract(config)
    specs = param_specs(like, make_mesh())
    flat = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    assert [len(spec) for spec in flat] == [leaf.ndim for leaf in jax.tree.leaves(like)]
    for spec, leaf in zip(flat, jax.tree.leaves(like), strict=True):
        # Nothing large is left whole by FSDP.
        assert leaf.ndim <= 2 + (leaf.shape[-1] < 64) or "fsdp" in jax.tree.leaves(tuple(spec))


def test_fp8_weights_and_their_scales_have_letters():
    like = abstract(presets.get("deepseek-v3.2-exp"), param_dtype=jnp.float8_e4m3fn)
    param_specs(like, make_mesh(MeshConfig(fsdp=8)))


def test_published_model_divides():
    # 8 devices here; 64 and 256 divide too if 8 does not hide a ragged width: check the widths.
    config = presets.get("deepseek-v3.2-exp")
    param_specs(abstract(config), make_mesh(MeshConfig(fsdp=8)))
    assert all(n % 256 == 0 for n in (config.hidden_size, config.q_lora_rank, config.kv_lora_rank))


def test_sizes_that_do_not_divide_are_refused():
    like = abstract(presets.get("tiny").replace(hidden_size=52))
    mesh = make_mesh(MeshConfig(fsdp=8))
    with pytest.raises(ValueError, match=r"embed_tokens/weight: dimension D=52 does not divide"):
        param_specs(like, mesh)
    param_specs(like, mesh, Rules(D=None, X=None))


def test_unknown_parameter_is_named():
    with pytest.raises(ValueError, match=r"parameter a/b has no letters"):
        param_specs({"a": {"b": jnp.zeros((2, 2))}}, make_mesh())


def test_optimizer_state_follows_its_parameters():
    like = abstract(presets.get("tiny"))
    state = {"step": jnp.zeros((), jnp.int32), "mu": {"x": like}}
    mesh = make_mesh(MeshConfig(fsdp=4))
    specs = param_specs(state, mesh)
    assert specs["step"] == P()
    assert jax.tree.leaves(specs["mu"]["x"]) == jax.tree.leaves(param_specs(like, mesh))


def test_eight_devices_compute_what_one_does():
    """Loss and gradients under jit with FSDP x data, placed by the rules."""
    config = presets.get("tiny").replace(num_hidden_layers=1, first_k_dense_replace=0)
    model = filled(config)
    tokens = tokens_of(config, 8, 24)

    def loss(model, tokens):
        out = model(tokens, attention="sparse")  # topk 8 of up to 24 keys
        p = jax.nn.log_softmax(out.logits[:, :-1])
        return -jnp.take_along_axis(p, tokens[:, 1:, None], axis=-1).mean()

    step = jax.value_and_grad(loss)
    value, gradient = jit(step)(model, tokens)

    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    placed = sharding.shardings(param_specs(model, mesh), mesh)
    rows = NamedSharding(mesh, sharding.batch_spec())
    sharded = jax.device_put(model, placed)
    run = jit(step, in_shardings=(placed, rows), out_shardings=(None, placed))
    value8, gradient8 = run(sharded, jax.device_put(tokens, rows))

    # fp32; sums over rows are made in another order.
    np.testing.assert_allclose(value8, value, rtol=1e-6)
    for one, eight in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient8), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-6)
    weight = gradient8.stacks[0].blocks[0].mlp.experts.gate_proj[...]
    assert weight.addressable_shards[0].data.shape == (1, 8, 12, 28)  # a quarter of D=48
    assert jnp.abs(weight).max() > 0
