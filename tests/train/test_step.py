"""The step on a real small model: what reaches what, and that nothing depends on how it is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from small_runs import LENGTH, MODEL, config, jit, loud_params, packed

from dsa_jax.sharding import MeshConfig, batch_spec, make_mesh
from train.optimizer import make_optimizer
from train.stages import Group, Stage, group_of, split
from train.start import param_shardings
from train.state import new_state, skeleton_of
from train.step import balanced, gradient, make_step, micro_batches, micro_loss

RNG = np.random.default_rng(1)
# Lengths on both sides of topk = 8, several documents a row, padding, one row of padding alone.
DOCUMENTS = [RNG.integers(2, 96, n) for n in (24, 17, 5, 12, 9, 3, 20, 11, 13, 6, 18)]
LAYOUT = [[0], [1, 2], [3, 4, 5], [6], [7, 8], [9, 10], []]
OTHER_LAYOUT = [[10, 9], [8, 7], [], [6], [5, 4, 3], [2, 1], [0], []]


@pytest.fixture(scope="module")
def model():
    run = config(Stage.SPARSE)
    skeleton = skeleton_of(run)
    return skeleton, loud_params(skeleton)


@functools.cache
def compiled_gradient(stage, skeleton, fields):
    run = config(stage, **dict(fields))
    return jit(lambda t, f, b: gradient(run, skeleton, t, f, b))


def whole_gradient(model, stage, layout=LAYOUT, mesh=None, **fields):
    """Loss terms and gradient of the documents in some layout, as NumPy."""
    skeleton, params = model
    batch = packed(DOCUMENTS, 8, LENGTH, layout)
    if mesh is not None:
        batch = jax.device_put(batch, NamedSharding(mesh, batch_spec()))
        params = jax.device_put(params, param_shardings(params, mesh))
    trainable, frozen = split(params, stage.trainable)
    run_it = compiled_gradient(stage, skeleton, tuple(fields.items()))
    with jax.set_mesh(mesh or make_mesh()):
        return jax.device_get(run_it(trainable, frozen, batch))


@pytest.fixture(scope="module")
def sparse(model):
    return whole_gradient(model, Stage.SPARSE)


@pytest.fixture(scope="module")
def warmup(model):
    return whole_gradient(model, Stage.WARMUP)


def assert_same(one, other):
    """Equal up to the order of fp32 sums: about 20 rows or 8 devices are added in another order,
    each addition rounding by 6e-8 of the largest term."""
    for name in one[0]:
        np.testing.assert_allclose(one[0][name], other[0][name], rtol=2e-6, err_msg=name)
    assert set(one[1]) == set(other[1])
    for path, g in one[1].items():
        assert np.abs(g).max() > 0, path
        np.testing.assert_allclose(g, other[1][path], atol=5e-6 * np.abs(g).max(), err_msg=path)


def test_the_case_is_about_selection(sparse, warmup):
    assert sparse[0]["valid_rows"] == sum(map(len, DOCUMENTS))
    assert sparse[0]["valid_targets"] == sum(len(d) - 1 for d in DOCUMENTS)
    assert (sparse[0]["kl_layers"] > 0.05).all()
    # On the selected keys alone the KL is another number than on all visible ones.
    assert (np.abs(sparse[0]["kl_layers"] - warmup[0]["kl_layers"]) > 0.02).all()


@pytest.mark.parametrize("stage", [Stage.SPARSE, Stage.WARMUP])
def test_micro_batches_do_not_change_value_or_gradient(model, stage, request):
    whole = request.getfixturevalue(stage.value)
    assert_same(whole, whole_gradient(model, stage, micro_batches=4))


@pytest.mark.parametrize("stage", [Stage.SPARSE, Stage.WARMUP])
def test_packing_does_not_change_value_or_gradient(model, stage, request):
    whole = request.getfixturevalue(stage.value)
    assert_same(whole, whole_gradient(model, stage, layout=OTHER_LAYOUT))


@pytest.mark.parametrize("stage", [Stage.SPARSE, Stage.WARMUP])
def test_devices_do_not_change_value_or_gradient(model, stage, request):
    whole = request.getfixturevalue(stage.value)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    assert_same(whole, whole_gradient(model, stage, mesh=mesh, micro_batches=2))


def test_micro_batches_stay_on_their_devices():
    cut = micro_batches(jnp.arange(8)[:, None] * jnp.ones((1, 2), int), 2)
    # Device d of two holds rows 4d..4d+3; of each part it must hold the rows it already has.
    assert cut[..., 0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_each_loss_reaches_its_own_parameters_only(model):
    """LM loss to the indexer and KL to the rest: exactly zero, and not zero where they belong."""
    skeleton, params = model
    run = config(Stage.SPARSE)
    batch = packed(DOCUMENTS, 8, LENGTH, LAYOUT)
    learning, fixed = split(params, (Group.MAIN, Group.INDEXER))

    @jit
    def gradients(params):
        one = jnp.float32(99)

        def losses(params):
            parts = micro_loss(run, skeleton, params, fixed, batch, one, one)[1]
            return parts["kl"], parts["lm_loss"]

        _, back = jax.vjp(losses, params)
        return back((1.0, 0.0))[0], back((0.0, 1.0))[0]

    kl, lm = gradients(learning)
    for path in learning:
        ours, other = (kl, lm) if group_of(path) is Group.INDEXER else (lm, kl)
        assert not np.any(other[path]), path
        assert np.any(ours[path]), path


def test_warmup_keeps_no_activations_and_does_no_head_work(model):
    """Six more layers cost six more indexers' gradients, not six more layers' activations."""
    temporary = {}
    for layers in (2, 8):
        run = config(Stage.WARMUP, model=MODEL.replace(num_hidden_layers=layers))
        skeleton = skeleton_of(run)
        trainable, frozen = split(skeleton.shapes, run.stage.trainable)
        batch = packed(DOCUMENTS, 8, LENGTH, LAYOUT)
        compiled = (
            jit(lambda t, f, b, r=run, s=skeleton: gradient(r, s, t, f, b))
            .lower(trainable, frozen, batch)
            .compile()
        )
        temporary[layers] = compiled.memory_analysis().temp_size_in_bytes
        assert "gate_proj" in compiled.as_text()  # arguments are named in it
        assert "lm_head" not in compiled.as_text()
    indexer = sum(4 * leaf.size for leaf in trainable.values()) // 8
    activation = 4 * batch["tokens"].size * MODEL.hidden_size
    grown = (temporary[8] - temporary[2]) / 6
    # The gradient as it is made and as it is summed over micro-batches, and per-layer numbers. A
    # backward pass would keep two dozen activations a layer at the least.
    assert grown < 2 * indexer + activation


def test_warmup_attends_as_the_dense_stage_does_bit_for_bit(model):
    skeleton, params = model
    batch = packed(DOCUMENTS, 8, LENGTH, LAYOUT)

    def hidden(stage):
        def run(params, batch):
            out = skeleton.model(params)(
                batch["tokens"],
                positions=batch["positions"],
                segment_ids=batch["segment_ids"],
                attention=stage.attention,
                indexer_loss=stage.indexer_loss,
            )
            return out.hidden, out.kl if stage is Stage.WARMUP else None

        return jit(run)(params, batch)

    (warm, kl), (dense, _) = hidden(Stage.WARMUP), hidden(Stage.DENSE)
    assert (kl > 0.05).all()
    assert np.asarray(warm).tobytes() == np.asarray(dense).tobytes()


def test_warmup_moves_the_indexers_and_nothing_else(model):
    skeleton, params = model
    run = config(Stage.WARMUP)
    optimizer = make_optimizer(run)
    step = jit(make_step(run, skeleton, optimizer))
    batch = packed(DOCUMENTS, 8, LENGTH, LAYOUT)
    state = new_state(run, params, optimizer)
    for _ in range(3):
        state, metrics = step(state, batch)
    assert bool(state.ok)
    assert int(state.step) == 3
    assert "lm_loss" not in metrics
    for path, leaf in params.items():
        same = np.array_equal(
            np.asarray(leaf).view(np.uint32), np.asarray(state.params[path]).view(np.uint32)
        )
        assert same == (group_of(path) is not Group.INDEXER), path

    # A step that meets NaN changes nothing, and neither does any step after it.
    name = "stacks/0/blocks/0/self_attn/q_a_proj/weight"
    broken = {**state.params, name: state.params[name].at[1].set(jnp.nan)}
    before = state._replace(params=broken)
    after, metrics = step(before, batch)
    assert not bool(metrics["ok"])
    assert not bool(after.ok)
    again, _ = step(after._replace(params=state.params), batch)
    for a, b in ((after, before), (again, state)):
        jax.tree.map(np.testing.assert_array_equal, a._replace(ok=0), b._replace(ok=0))


def test_balancing_by_hand():
    params = {
        "stacks/0/blocks/0/mlp/gate/e_score_correction_bias": jnp.zeros((1, 4)),
        "stacks/1/blocks/0/mlp/gate/e_score_correction_bias": jnp.ones((2, 4)),
        "stacks/1/blocks/0/mlp/gate/weight": jnp.ones((2, 3, 4)),
    }
    load = jnp.array([[4.0, 2, 1, 1], [3, 3, 3, 3], [0, 0, 0, 9]])
    moved = balanced(params, load, 0.5)
    first, second = moved.values()
    assert len(moved) == 2
    assert first.tolist() == [[-0.5, 0, 0.5, 0.5]]
    assert second.tolist() == [[1, 1, 1, 1], [1.5, 1.5, 1.5, 0.5]]
    with pytest.raises(ValueError, match="2 layers, the biases 3"):
        balanced(params, load[:2], 0.5)
