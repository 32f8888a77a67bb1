"""Routing by hand, and the sorted computation against one expert at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from small_models import jit

from dsa_jax import presets
from dsa_jax.config import Numerics
from dsa_jax.moe import MoE, Routing, SwiGLU, combined, copies, dispatch, gate_product, route
from dsa_jax.sharding import MeshConfig, make_mesh, path_name

TINY = presets.get("tiny")  # 8 experts in 4 groups, 2 groups eligible, 2 experts a token


def test_routing_by_hand():
    # Groups (0,1) (2,3) (4,5) (6,7); the sums of the best two are 0.9, 1.0, 0.85, 0.95.
    scores = jnp.array([[0.8, 0.1, 0.5, 0.5, 0.84, 0.01, 0.6, 0.35]])
    routing = route(scores, jnp.zeros(8), TINY)
    # Eligible are groups 1 and 3; expert 4, the best of all, is not.
    assert sorted(np.asarray(routing.experts[0])) == [2, 6]
    expected = {2: 0.5 / 1.1 * 2.5, 6: 0.6 / 1.1 * 2.5}
    for e, w in zip(np.asarray(routing.experts[0]), routing.weights[0], strict=True):
        assert w == pytest.approx(expected[e], rel=1e-6)


def test_bias_chooses_and_does_not_weigh():
    scores = jnp.array([[0.8, 0.1, 0.5, 0.5, 0.84, 0.01, 0.6, 0.35]])
    bias = jnp.array([0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0])
    routing = route(scores, bias, TINY)
    assert set(np.asarray(routing.experts[0])) == {3, 6}
    ordered = routing.weights[0][np.argsort(routing.experts[0])]
    np.testing.assert_allclose(ordered, [0.5 / 1.1 * 2.5, 0.6 / 1.1 * 2.5], rtol=1e-6)


def test_negative_choices_beat_masked_experts():
    """All biased scores below zero: an expert of a masked group must still lose."""
    scores = jnp.full((1, 8), 0.1).at[0, :4].set(jnp.array([0.3, 0.2, 0.25, 0.22]))
    routing = route(scores, jnp.full(8, -2.0), TINY)
    assert set(np.asarray(routing.experts[0])) <= {0, 1, 2, 3}


def test_switches():
    scores = jnp.array([[0.8, 0.1, 0.5, 0.5, 0.84, 0.01, 0.6, 0.35]])
    free = route(scores, jnp.zeros(8), TINY.replace(n_group=1, topk_group=1))
    assert list(np.asarray(free.experts[0])) == [4, 0]
    raw = route(scores, jnp.zeros(8), TINY.replace(norm_topk_prob=False))
    assert sorted(np.asarray(raw.weights[0])) == pytest.approx([0.5 * 2.5, 0.6 * 2.5])


def test_no_gradient_reaches_the_bias():
    scores = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (5, 8)))
    weights = jnp.arange(10.0).reshape(5, 2)

    def loss(scores, bias):
        return (route(scores, bias, TINY).weights * weights).sum()

    to_scores, to_bias = jax.grad(loss, (0, 1))(scores, jnp.full(8, 0.1))
    assert to_scores.any()
    assert not to_bias.any()


def test_dispatch_sorts_and_unsorts():
    experts = jnp.array([[3, 0], [0, 2], [3, 2]])
    token, row, group_sizes = dispatch(Routing(experts, jnp.ones((3, 2))), 4)
    np.testing.assert_array_equal(group_sizes, [2, 0, 2, 2])
    np.testing.assert_array_equal(token, [0, 1, 1, 2, 0, 2])
    np.testing.assert_array_equal(token[row], [[0, 0], [1, 1], [2, 2]])
    np.testing.assert_array_equal(np.repeat(np.arange(4), group_sizes)[row], experts)


def make(**options):
    dtypes = {"dtype": jnp.float32, "param_dtype": jnp.float32} | options
    return MoE(TINY, rngs=nnx.Rngs(0), **dtypes)


def test_gradients_of_copies_are_gathered():
    """What autodiff makes of the same gathers, to the rounding of a sum of three numbers."""
    rng = np.random.default_rng(3)
    experts = jnp.asarray(np.argsort(rng.random((40, 5)), axis=1)[:, :3], jnp.int32)
    x, g, weights = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((40, 6),) * 2 + ((40, 3),)
    )
    rows = dispatch(Routing(experts, weights), 5)
    scale = jnp.arange(1.0, 121.0)[:, None]  # so that rows differ

    def ours(x, weights):
        return combined(jnp.sin(scale * copies(x, rows)), weights, rows)

    def plain(x, weights):
        y = jnp.sin(scale * x[rows.token])[rows.row]
        return (y * weights[..., None]).sum(axis=1)

    def value_and_gradients(f):
        def run(x, weights, g):
            out, pull = jax.vjp(f, x, weights)
            return out, *pull(g)

        return run

    run = [value_and_gradients(f) for f in (ours, plain)]
    for a, b in zip(*(jit(f)(x, weights, g) for f in run), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    assert "scatter-add" not in str(jax.make_jaxpr(run[0])(x, weights, g))
    assert "scatter-add" in str(jax.make_jaxpr(run[1])(x, weights, g))


def test_one_expert_at_a_time():
    """Value and gradients, the tokens' too, equal those of the dense sum over all experts."""
    moe = make()
    x = jax.random.normal(jax.random.key(1), (2, 11, 48))

    def plainly(moe, x):
        flat = x.reshape(-1, 48)
        routing = moe.gate(flat)
        out = moe.shared_experts(flat)
        for e in range(8):
            w = {n: getattr(moe.experts, f"{n}_proj")[e] for n in ("gate", "up", "down")}
            y = gate_product(flat @ w["gate"], flat @ w["up"]) @ w["down"]
            share = jnp.where(routing.experts == e, routing.weights, 0.0).sum(-1)
            out = out + share[:, None] * y
        return out.reshape(x.shape)

    @jit
    def both(moe, x):
        counted = jnp.ones(x.shape[:2], bool)
        ours = lambda moe, x: (moe(x, counted)[0] ** 2).sum()  # noqa: E731
        theirs = lambda moe, x: (plainly(moe, x) ** 2).sum()  # noqa: E731
        return [jax.value_and_grad(loss, (0, 1))(moe, x) for loss in (ours, theirs)]

    (value, gradient), (expected, expected_gradient) = both(moe, x)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    # fp32 sums over 22 tokens in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient,
        expected_gradient,
    )


def test_experts_widths_over_two_devices():
    """Experts that no axis deals out, their widths cut: gradients equal one device's."""
    moe = make()
    x = jax.random.normal(jax.random.key(2), (2, 8, 48))

    def gradients(sizes):
        def loss(moe, x):
            return (moe(x, jnp.ones(x.shape[:2], bool))[0] ** 2).sum()

        with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
            return jit(jax.grad(loss, (0, 1)))(moe, x)

    pairs = zip(
        *(jax.tree.leaves(gradients(s)) for s in ({}, {"data": 2, "tensor": 2})), strict=True
    )
    for one, cut in pairs:
        np.testing.assert_allclose(cut, one, rtol=1e-4, atol=1e-5 * np.abs(one).max())


def test_load_counts_what_is_counted():
    x = jax.random.normal(jax.random.key(1), (2, 11, 48))
    counted = jnp.arange(11)[None] < jnp.array([[11], [4]])
    moe = make()
    _, load = moe(x, counted)
    experts = moe.gate(x.reshape(-1, 48)).experts.reshape(2, 11, 2)
    chosen = np.concatenate([np.asarray(experts[0]), np.asarray(experts[1, :4])])
    np.testing.assert_array_equal(load, np.bincount(chosen.ravel(), minlength=8))
    assert load.sum() == 15 * 2


def test_router_reads_fp32():
    """In bf16 compute the logits are those of fp32 weights, not of rounded ones."""
    moe = make(dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (64, 48), jnp.bfloat16)
    logits = np.asarray(x, np.float64) @ np.asarray(moe.gate.weight[...], np.float64)
    scores = jnp.asarray(1 / (1 + np.exp(-logits)), jnp.float32)
    expected = route(scores, moe.gate.e_score_correction_bias[...], TINY)
    np.testing.assert_array_equal(moe.gate(x).experts, expected.experts)
    np.testing.assert_allclose(moe.gate(x).weights, expected.weights, rtol=1e-5)


def gate_product_twice(gate, up):
    return gate_product(gate, up, round_first=True)


def test_swiglu_multiplies_in_fp32():
    gate = jnp.asarray(np.random.default_rng(0).standard_normal(256), jnp.bfloat16)
    up = gate[::-1]
    wide = np.asarray(gate, np.float64) / (1 + np.exp(-np.asarray(gate, np.float64)))
    exact = wide * np.asarray(up, np.float64)
    np.testing.assert_array_equal(gate_product(gate, up), jnp.asarray(exact, jnp.bfloat16))
    activated = jnp.asarray(wide, jnp.bfloat16)
    twice = (activated.astype(jnp.float32) * up).astype(jnp.bfloat16)
    np.testing.assert_array_equal(jit(gate_product_twice)(gate, up), twice)
    assert (np.asarray(twice) != np.asarray(gate_product(gate, up))).mean() > 0.05
    mlp = SwiGLU(TINY, 80, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    x = jnp.ones((1, 48))
    expected = gate_product(mlp.gate_proj(x), mlp.up_proj(x)) @ mlp.down_proj.weight[...]
    np.testing.assert_allclose(mlp(x), expected, rtol=1e-6)


def test_fp8_experts_are_near_the_float_ones():
    """e4m3 weights and activations: four bits each, so a few per cent of the output."""
    config = presets.get("tiny-fp8").replace(
        fp8_weights=presets.get("deepseek-v3.2-exp").fp8_weights, moe_intermediate_size=128
    )
    x = jax.random.normal(jax.random.key(1), (1, 16, 128))
    outs = []
    for param_dtype in (jnp.float32, jnp.float8_e4m3fn):
        moe = MoE(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=param_dtype)
        out = moe.experts(x[0], jnp.full(8, 2, jnp.int32))
        outs.append(np.asarray(out))
    error = np.std(outs[1] - outs[0]) / np.std(outs[0])
    assert 0.01 < error < 0.1


def test_epsilon_of_the_gate():
    """Affinities that underflow leave nothing to divide by, except with an epsilon."""
    scores = jnp.zeros((1, 8))
    bias = jnp.arange(8.0)
    assert jnp.isnan(route(scores, bias, TINY).weights).all()
    theirs = TINY.replace(numerics=Numerics(gate_epsilon=1e-20))
    assert not route(scores, bias, theirs).weights.any()
    with pytest.raises(ValueError, match="gate_epsilon=-1"):
        Numerics(gate_epsilon=-1)


def test_rounding_the_experts_sum():
    """With the switch the routed sum is rounded, then the sum with the shared expert."""
    x = jax.random.normal(jax.random.key(1), (1, 64, 48), jnp.bfloat16)
    counted = jnp.ones((1, 64), bool)
    both = []
    for rounded in (False, True):
        config = TINY.replace(numerics=Numerics(round_experts=rounded))
        moe = MoE(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.float32)
        both.append(np.asarray(jit(lambda moe, x: moe(x, counted)[0])(moe, x), np.float32))
    once, twice = both
    assert 0 < (once != twice).mean() < 0.5
    np.testing.assert_allclose(once, twice, rtol=2**-7, atol=2**-8 * np.abs(once).max())


def test_experts_are_gathered_along_an_outermost_dimension():
    """Else XLA for GPUs turns the masters of all layers before their scan, into a second copy."""
    experts = MoE(TINY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.float32).experts
    cut = {
        "gate_proj": P(None, "fsdp"),
        "up_proj": P(None, "fsdp"),
        "down_proj": P(None, None, "fsdp"),
    }
    specs = jax.tree_util.tree_map_with_path(lambda path, _: cut[path_name(path)], experts)
    mesh = make_mesh(MeshConfig(fsdp=4))
    whole = jax.jit(
        jax.shard_map(lambda e: e.whole(("fsdp",)), mesh=mesh, in_specs=(specs,), out_specs=specs)
    )
    text = whole.lower(experts).as_text()
    assert re.findall(r"all_gather_dim = (\d)", text) == ["0", "0", "0"]
    # Each device's result is everything; cut again as if it were its own part, four times that.
    for name, spec in cut.items():
        w = np.asarray(getattr(experts, name)[...].astype(jnp.bfloat16))
        found = np.asarray(getattr(whole(experts), name)[...])
        np.testing.assert_array_equal(found, np.concatenate([w] * 4, axis=len(spec) - 1))
