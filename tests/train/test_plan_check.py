"""The plan's check on a GPU, as far as it can be tried without one."""

import jax
import pytest

from benchmarks import plan_check
from dsa_jax.sharding import make_mesh
from train.start import plan


@pytest.mark.parametrize("name", ["sparse-8k-2layers", "warmup-64k", "dense-32k"])
def test_inputs_are_what_the_step_takes(name):
    _, config = plan_check.planned(plan_check.CASES[name], "h100")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        wanted = plan(config, mesh).state
    state, batch = jax.eval_shape(lambda: plan_check.inputs(config))
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert {x.shape for x in batch.values()} == {(config.batch_size, config.sequence_length)}


def test_kernels_are_summed_up_by_name():
    launches = [("a", 1.0), ("b", 5.0), ("a", 2.0)]
    assert plan_check.kernels(launches) == [("b", 1, 5.0), ("a", 2, 3.0)]
