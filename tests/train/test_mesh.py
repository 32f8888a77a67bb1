"""Every axis of the mesh computes what one device does: losses, gradients, selections."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from small_runs import config, jit, loud_params, packed

from dsa_jax import presets
from dsa_jax.config import ModelConfig
from dsa_jax.sharding import MeshConfig, batch_spec, make_mesh
from tests.processes import run_pair
from train.config import TrainConfig
from train.stages import Stage, split
from train.start import param_shardings, plan
from train.state import Skeleton, skeleton_of
from train.step import gradient

# A dense layer and one with experts, or the latter alone; topk 8 is far below T.
TWO_LAYERS = presets.get("tiny").replace(num_hidden_layers=2, first_k_dense_replace=1)
ONE_LAYER = presets.get("tiny").replace(num_hidden_layers=1, first_k_dense_replace=0)
LENGTH = 32
RNG = np.random.default_rng(1)
# Lengths on both sides of topk, several documents a row, across chunks, padding, one empty row.
DOCUMENTS = [RNG.integers(2, 96, n) for n in (32, 17, 5, 12, 9, 3, 27, 11, 13, 6, 18)]
LAYOUT = [[0], [1, 2], [3, 4, 5], [6], [7, 8], [9, 10], []]
# Compiling is what takes the time: each pair of axes once, here, in the two processes, or, data and
# fsdp, in test_step.py.
MESHES = [
    ({"data": 2, "expert": 2, "tensor": 2}, TWO_LAYERS),
    ({"fsdp": 2, "context": 2, "tensor": 2}, ONE_LAYER),
    ({"data": 2, "context": 4}, ONE_LAYER),
]
IN_TWO_PROCESSES = {"fsdp": 2, "expert": 2, "context": 2}


def ids(mesh) -> str:
    return "-".join(f"{axis}{size}" for axis, size in mesh.items())


def run_config(stage: Stage, model: ModelConfig, **fields) -> TrainConfig:
    return config(stage, model=model, **{"sequence_length": LENGTH, **fields})


@functools.cache
def filled(model: ModelConfig) -> tuple[Skeleton, dict]:
    skeleton = skeleton_of(run_config(Stage.SPARSE, model))
    return skeleton, loud_params(skeleton)


def loss_and_gradient(stage: Stage, model: ModelConfig, sizes: dict[str, int], devices=None):
    """Loss terms and gradient of the whole batch, on the devices."""
    skeleton, params = filled(model)
    run = run_config(stage, model, mesh=MeshConfig(**sizes))
    batch = packed(DOCUMENTS, 8, LENGTH, LAYOUT)
    mesh = make_mesh(run.mesh, devices)
    with jax.set_mesh(mesh):
        placed = param_shardings(params, mesh)
        params = jax.device_put(params, placed)
        trainable, frozen = split(params, stage.trainable)
        place = {path: placed[path] for path in trainable}
        fn = jit(lambda t, f, b: gradient(run, skeleton, t, f, b), out_shardings=(None, place))
        return fn(trainable, frozen, jax.device_put(batch, NamedSharding(mesh, batch_spec())))


@functools.cache
def one_device(stage: Stage, model: ModelConfig):
    return jax.device_get(loss_and_gradient(stage, model, {}))


def assert_same(found, expected):
    """Equal up to the order of fp32 sums over tokens, heads and experts."""
    for name, value in expected[0].items():
        np.testing.assert_allclose(found[0][name], value, rtol=2e-6, err_msg=name)
    assert set(found[1]) == set(expected[1])
    for path, g in expected[1].items():
        assert np.abs(g).max() > 0, path
        # Largest seen: 3e-6 of the largest entry.
        np.testing.assert_allclose(found[1][path], g, atol=1e-5 * np.abs(g).max(), err_msg=path)


@pytest.mark.parametrize(("sizes", "model"), MESHES, ids=[ids(sizes) for sizes, _ in MESHES])
@pytest.mark.parametrize("stage", [Stage.SPARSE, Stage.WARMUP])
def test_devices_compute_what_one_does(stage, sizes, model):
    found = loss_and_gradient(stage, model, sizes)
    assert_same(jax.device_get(found), one_device(stage, model))
    # And each holds its part only of every large gradient.
    parts = np.prod([n for axis, n in sizes.items() if axis != "data"])
    for path, g in found[1].items():
        if "norm" not in path and "bias" not in path and "indexer" not in path:
            held = g.addressable_shards[0].data.size
            assert held * parts <= g.size * (2 if _whole_along_tensor(path) else 1), path


def _whole_along_tensor(path: str) -> bool:
    return any(name in path for name in ("q_a_proj", "kv_a_proj", "mlp/gate/"))


def test_devices_choose_the_same_keys():
    """Zig-zag queries against keys in natural order, on eight devices of one row."""
    skeleton, params = filled(ONE_LAYER)
    batch = packed(DOCUMENTS, 8, LENGTH, LAYOUT)
    tokens, segments = batch["tokens"], batch["segment_ids"]  # sixteen chunks of two tokens

    def choose(params, tokens, segments):
        out = skeleton.model(params)(tokens, segment_ids=segments, return_selection=True)
        assert out.selection is not None
        return out.selection.indices, out.hidden

    one = jit(choose)(params, tokens, segments)
    with jax.set_mesh(make_mesh(MeshConfig(context=8))):
        indices, hidden = jit(choose)(params, tokens, segments)
    np.testing.assert_array_equal(indices, one[0])
    assert ((indices >= 0).sum(-1) == ONE_LAYER.index_topk).any()
    assert hidden.sharding.shard_shape(hidden.shape)[1] == 4
    np.testing.assert_allclose(hidden, one[1], atol=1e-5)


PROGRAM = """
import sys
import jax
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
sys.path[:0] = ["tests/train"]
import numpy as np
from jax.experimental.multihost_utils import process_allgather
import test_mesh
from train.config import TrainConfig
from train.stages import Stage

# Neighbours along `context`, the innermost axis, are in different processes.
devices = sorted(jax.devices(), key=lambda d: (d.id % 4, d.process_index))
for stage in (Stage.SPARSE, Stage.WARMUP):
    found = test_mesh.loss_and_gradient(
        stage, test_mesh.ONE_LAYER, test_mesh.IN_TWO_PROCESSES, devices
    )
    assert not all(x.is_fully_addressable for x in jax.tree.leaves(found))
    metrics, gradients = process_allgather(found, tiled=True)
    if rank == 0:
        np.savez(f"{folder}/{stage.value}-metrics.npz", **metrics)
        np.savez(f"{folder}/{stage.value}-gradients.npz", **gradients)
"""


def test_two_processes_compute_what_one_device_does(tmp_path):
    run_pair(PROGRAM, tmp_path, seconds=300)
    for stage in (Stage.SPARSE, Stage.WARMUP):
        found = [
            np.load(tmp_path / f"{stage.value}-{part}.npz") for part in ("metrics", "gradients")
        ]
        assert_same(found, one_device(stage, ONE_LAYER))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"batch_size": 6, "mesh": MeshConfig(fsdp=2, expert=2)},
            r"6 sequences.*mesh.data x mesh.f",
        ),
        (
            {"batch_size": 4, "mesh": MeshConfig(fsdp=8)},
            r"batch_size=4 .*4 sequences at a time.*over 8 devices.*multiple of 8",
        ),
        (
            {"sequence_length": 20, "mesh": MeshConfig(context=4)},
            r"sequence_length=20 .*multiple of 8",
        ),
        (
            {"batch_size": 10, "mesh": MeshConfig(expert=5)},
            r"=48 does not divide by .*mesh.expert=5",
        ),
    ],
)
def test_bad_meshes_are_refused(fields, complaint):
    run = run_config(Stage.SPARSE, ONE_LAYER, **fields)
    mesh = make_mesh(run.mesh)
    with pytest.raises(ValueError, match=complaint):
        plan(run, mesh)
