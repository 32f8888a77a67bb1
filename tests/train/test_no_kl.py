"""With coefficient 0, and in evaluation, no KL is computed: the compiled programs show it."""

import jax
import numpy as np
from small_runs import LENGTH, config, jit, loud_params, packed

from train.evaluate import _forward
from train.optimizer import make_optimizer
from train.stages import Group, Stage, group_of
from train.state import new_state, skeleton_of
from train.step import make_step

# The functions that compute a divergence or its gradient, as the program's metadata names them.
KL = ("dense_forward", "dense_backward", "sparse_forward", "sparse_backward")
BATCH = packed([list(range(1, 21))], 1, LENGTH, [[0]])


def lowered_step(coefficient: float):
    """A sparse step of one sequence, and a state."""
    run = config(Stage.SPARSE, kl_coefficient=coefficient, batch_size=1)
    skeleton, optimizer = skeleton_of(run), make_optimizer(run)
    state = new_state(run, loud_params(skeleton), optimizer)
    return jit(make_step(run, skeleton, optimizer)).lower(state, BATCH), state


def kl_work(text: str | None) -> set[str]:
    assert "o_proj" in (text or "")  # names are in it
    return {name for name in KL if f"jit({name})" in (text or "")}


def test_coefficient_0_does_no_kl_work():
    """Nor do the indexers change, not even by weight decay; they have no optimizer state."""
    lowered, before = lowered_step(0.0)
    compiled = lowered.compile()
    assert not kl_work(compiled.as_text())
    after, metrics = compiled(before, BATCH)
    assert "kl" not in metrics
    assert metrics["loss"] == metrics["lm_loss"]
    for path, leaf in before.params.items():
        same = np.array_equal(after.params[path], leaf)
        assert same == (group_of(path) is Group.INDEXER), path
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(after.opt_state)]
    assert any("o_proj" in path for path in paths)
    assert not any("indexer" in path for path in paths)


def test_that_test_can_fail():
    text = lowered_step(1.0)[0].as_text(debug_info=True)
    assert kl_work(text) == {"sparse_forward", "sparse_backward"}


def test_evaluation_does_no_kl_work():
    skeleton = skeleton_of(config(Stage.SPARSE))
    model = skeleton.model(skeleton.shapes)
    lowered = _forward.lower(model, BATCH, "sparse", 8, None, None, np.int32(0), keys=8)
    assert not kl_work(lowered.compile().as_text())
