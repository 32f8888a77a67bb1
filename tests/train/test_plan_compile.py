"""Plans that compile: for eight CPU devices everywhere, for eight H100s with JAX's CUDA plugin."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from dsa_jax import presets
from dsa_jax.moe import MoE
from dsa_jax.sharding import MeshConfig, Rules, make_mesh, param_specs, shardings
from train.plan import PlanOptions, make, report, to_json
from train.plan.compiled import CompileError, compile_step, plugin_found
from train.plan.hardware import GPUS
from train.plan.options import train_config
from train.plan.worker import OPTIONS, topology
from train.stages import Stage


def small(mesh, **changes):
    """Two dense layers: little to compile."""
    model = presets.get("tiny").without_indexer().replace(
        num_hidden_layers=2, first_k_dense_replace=2
    )  # fmt: skip
    options = PlanOptions(
        preset="tiny", stage=Stage.DENSE, mesh=mesh, sequence_length=64, batch_size=16, steps=10,
        **changes,
    )  # fmt: skip
    return options, model


def check(found, source):
    assert found.fits
    assert {figure.source for figure in found.memory} == {"counted", source}
    compiled = found.compiled
    held = found.state.parameter_bytes + found.state.optimizer_bytes
    batch = 4 * 4 * 16 * 64 / 8  # four arrays of int32, two sequences in four parts
    assert compiled.memory["arguments"] == pytest.approx(held + batch, abs=16)
    assert compiled.memory["temporaries"] > found.state.gradient_bytes
    by_axes = {one.axes for one in found.traffic}
    assert ("context",) in by_axes, "keys are gathered"
    assert any("fsdp" in axes for axes in by_axes), "weights are gathered"
    assert all(one.group <= 8 for one in found.traffic)
    gathered = sum(one.bytes_sent for one in found.traffic if one.op == "all-gather")
    assert gathered > 0
    assert found.estimate.network > 0


def test_compiled_for_cpu_devices():
    options, model = small(MeshConfig(fsdp=2, context=4), compile="cpu")
    phases = []
    found = make(options, phases.append, model)
    check(found, "compiled for CPU")
    assert phases == ["tracing", "compiling", "reading the program"]
    assert any("compiled for CPU devices" in note for note in found.notes)
    assert to_json(found)["compile_seconds"] > 0


@pytest.mark.aot
@pytest.mark.skipif(not plugin_found(), reason="needs JAX's CUDA plugin")
def test_a_compile_that_fails_says_why():
    options, model = small(MeshConfig(context=2))
    config = train_config(options.resolved(), model, options.mesh)
    wrong = GPUS["h100"]._replace(name='"')  # breaks the description
    with pytest.raises(CompileError, match="compiling for 2 devices"):
        compile_step(config, wrong, "cuda")


@pytest.mark.aot
@pytest.mark.skipif(not plugin_found(), reason="needs JAX's CUDA plugin")
def test_compiled_for_h100s():
    options, model = small(MeshConfig(fsdp=2, context=4), compile="cuda")
    found = make(options, model=model)
    check(found, "compiled")
    assert found.compiled is not None
    assert found.compiled.work.dot_flop > 0


def test_the_gpus_need_the_plugin(monkeypatch):
    monkeypatch.setattr(report, "plugin_found", lambda: False)
    options, model = small(MeshConfig(context=2), compile="cuda")
    with pytest.raises(ValueError, match=r"compile='cuda' needs JAX's CUDA plugin.*compile='cpu'"):
        make(options, model=model)
    many = PlanOptions(devices=256, mesh=MeshConfig(expert=16, context=16))
    assert make(many).compiled is None, "hundreds of CPU devices are not compiled for"


@pytest.mark.aot
@pytest.mark.skipif(not plugin_found(), reason="needs JAX's CUDA plugin")
def test_gradients_of_weights_are_cut_as_they_are_summed():
    """Reduce-scattered: an all-reduce would send twice as much and hold it whole."""
    model = presets.get("tiny").replace(num_hidden_layers=1, first_k_dense_replace=1)
    mesh = MeshConfig(fsdp=2, expert=2, context=2, tensor=2)
    options, _ = small(mesh, compile="cuda")
    options = dataclasses.replace(options, stage=Stage.SPARSE)
    # All axes that split tokens. With tensor parallelism the queries of the indexer's loss are cut
    # over `tensor` too, and one small weight of it is summed in steps, over some axes at a time.
    summing = {"fsdp", "expert", "context"}
    summed = {"all-reduce": 0.0, "reduce-scatter": 0.0}
    for one in make(options, model=model).traffic:
        if one.op in summed and summing <= set(one.axes):
            summed[one.op] += one.bytes_sent
    # What is left are norms, biases and numbers for the metrics.
    assert summed["all-reduce"] < 0.1 * summed["reduce-scatter"], summed


@pytest.mark.aot
@pytest.mark.skipif(not plugin_found(), reason="needs JAX's CUDA plugin")
def test_there_is_no_second_copy_of_the_experts(monkeypatch):
    """Weights cut by fsdp are gathered layer by layer: a loop over layers needs room for one."""
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    layers, width = 64, 512
    model = presets.get("tiny").replace(moe_intermediate_size=width)

    def make(key):
        return MoE(model, rngs=nnx.Rngs(key), dtype=jnp.bfloat16, param_dtype=jnp.float32)

    def run(stack, x):
        counted = jnp.ones(x.shape[:2], bool)
        return jax.lax.scan(lambda x, layer: (layer(x, counted)[0], None), x, stack["mlp"])[0]

    mesh = make_mesh(MeshConfig(fsdp=4, context=2), topology(GPUS["h100"].target, 8, 8))
    stack = jax.eval_shape(
        lambda: {"mlp": jax.vmap(make)(jax.random.split(jax.random.key(0), layers))}
    )
    with jax.set_mesh(mesh):
        where = shardings(param_specs(stack, mesh), mesh)
        arguments = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            (stack, jax.ShapeDtypeStruct((8, 2, model.hidden_size), jnp.bfloat16)),
            (where, NamedSharding(mesh, Rules().spec("B T _"))),
        )
        compiled = (
            jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).compile(OPTIONS)
        )
    held = layers * 3 * model.n_routed_experts * model.hidden_size * width * 4 / mesh.size
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < held / 2
