"""Checkpoints: bit-equal round trips onto any mesh, and nothing half-written or silently wrong."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from small_models import filled

import dsa_jax
from dsa_jax import checkpoint, presets
from dsa_jax.checkpoint import CheckpointError, CheckpointWriter, load, save
from dsa_jax.layer_tree import flatten, split_layers
from dsa_jax.sharding import MeshConfig, Rules, make_mesh

ROOT = Path(dsa_jax.__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    return filled(presets.get("tiny"))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    save(model, path)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def assert_equal(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=str(name))


def test_round_trip(model, saved):
    loaded = load(saved, dtype=jnp.float32)
    assert loaded.config == model.config
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    assert_equal(loaded, model)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(loaded))
    assert set(os.listdir(saved)) == {"config.json", "params"}
    assert not list(saved.parent.glob("*writing*"))


def test_layers_with_and_without_indexers_and_other_numerics(tmp_path):
    model = filled(presets.get("tiny-shared"), dtype=jnp.bfloat16)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.config == model.config
    assert_equal(loaded, model)


def test_any_mesh_to_any_mesh(model, saved, tmp_path):
    fsdp = load(saved, make_mesh(MeshConfig(data=2, fsdp=4)), dtype=jnp.float32)
    weight = fsdp.stacks[1].blocks[0].mlp.experts.gate_proj[...]
    assert weight.addressable_shards[0].data.shape == (2, 8, 12, 28)  # a quarter of D=48
    assert_equal(fsdp, model)
    save(fsdp, tmp_path / "sharded")
    assert_equal(
        load(tmp_path / "sharded", make_mesh(MeshConfig(fsdp=2)), dtype=jnp.float32), model
    )
    rules = Rules(D=None, Q=None, C=None)
    whole = load(
        tmp_path / "sharded", make_mesh(MeshConfig(data=8)), rules=rules, dtype=jnp.float32
    )
    assert_equal(whole, model)


def test_small_groups_change_nothing(model, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_GROUP_BYTES", 40_000)
    save(model, tmp_path / "model")
    assert_equal(load(tmp_path / "model", dtype=jnp.float32), load(saved, dtype=jnp.float32))


def test_parameters_can_change_dtype_on_the_way(model, saved):
    loaded = load(saved, param_dtype=jnp.bfloat16)
    weight = loaded.stacks[0].blocks[0].self_attn.o_proj.weight[...]
    assert weight.dtype == jnp.bfloat16
    wanted = model.stacks[0].blocks[0].self_attn.o_proj.weight[...].astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(weight), np.asarray(wanted))
    with pytest.raises(CheckpointError, match=r"stores float32 weights.*float8_e4m3fn"):
        load(saved, param_dtype=jnp.float8_e4m3fn)


def test_a_writer_takes_pieces_in_any_order(model, tmp_path):
    tree = split_layers(model, model.config)
    with CheckpointWriter(tmp_path / "model", model.config) as writer:
        for i in (2, 0, 1):
            writer.write({"layers": {str(i): tree["layers"][str(i)]}})
        writer.write({name: tree[name] for name in tree if name != "layers"})
        assert not (tmp_path / "model").exists()
    assert_equal(load(tmp_path / "model", dtype=jnp.float32), model)


# --- nothing half-written -------------------------------------------------------------------------


def test_an_existing_destination_is_refused(model, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="model exists; choose another path"):
        save(model, tmp_path / "model")
    assert (tmp_path / "model" / "thesis.tex").read_text() == "precious"


def test_remote_paths_are_refused(model):
    with pytest.raises(ValueError, match="gs://bucket/model: only file systems"):
        save(model, "gs://bucket/model")


def test_an_error_in_the_middle_leaves_nothing(model, tmp_path):
    tree = split_layers(model, model.config)

    def write_some():
        with CheckpointWriter(tmp_path / "model", model.config) as writer:
            writer.write({"norm": tree["norm"]})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_some()
    assert not list(tmp_path.iterdir())


SAVE = """
import resource
import sys

import jax

jax.config.update("jax_platforms", "cpu")

from small_models import filled

from dsa_jax import checkpoint, presets

folder, times, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = filled(presets.get("tiny"))
print("ready", flush=True)
if limit:  # no file may grow beyond this: what a write meets on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for i in range(times):
    try:
        checkpoint.save(model, f"{folder}/{i}")
    except checkpoint.CheckpointError as error:
        print(f"CheckpointError: {error}")
"""


def start_saving(folder, *, times, limit=0):
    """Saves models to `folder/0`, `folder/1`, ... in another process."""
    return subprocess.Popen(
        [sys.executable, "-c", SAVE, str(folder), str(times), str(limit)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    process = start_saving(tmp_path, times=1, limit=20_000)
    out, err = process.communicate(timeout=120)
    assert f"CheckpointError: could not save to {tmp_path}/0, nothing is there" in out, err
    assert not list(tmp_path.iterdir())


def test_a_kill_never_leaves_what_loads_as_whole(model, tmp_path):
    process = start_saving(tmp_path, times=1000)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.time() + 60
    # The third save is under way; the first two are whole.
    while not list(tmp_path.glob("2.writing-*")) and time.time() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    whole = [path.name for path in tmp_path.iterdir() if ".writing-" not in path.name]
    assert len(whole) >= 2
    for name in whole:
        assert_equal(load(tmp_path / name, dtype=jnp.float32), model)
    # What was left over is in nobody's way.
    save(model, tmp_path / str(len(whole)))
    assert_equal(load(tmp_path / str(len(whole)), dtype=jnp.float32), model)


# --- nothing silently wrong -----------------------------------------------------------------------


def test_absent_and_foreign_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*/nothing"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of dsa_jax: it needs config"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "\x00\x01", "{}", '{"model_type": "deepseek_v32"}'])
def test_a_damaged_config_names_the_path(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=str(copy)):
        load(copy)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kv_lora_rank": 36}, r"layers/0/self_attn/kv_a_.* has shape .*of another config"),
        ({"num_hidden_layers": 4}, r"lacks .* parameters .*: layers/3/"),
        ({"num_hidden_layers": 2}, r"holds .* parameters .*does not know: layers/2/"),
        ({"n_routed_experts": 16}, r"experts/down_proj has shape \(8, 28, 48\).*\(16, 28, 48\)"),
    ],
)
def test_parameters_of_another_config(copy, change, complaint):
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=complaint):
        load(copy)


def test_a_missing_leaf_is_named(model, tmp_path):
    tree = split_layers(model, model.config)
    del tree["layers"]["2"]["self_attn"]["indexer"]["wk"]
    with CheckpointWriter(tmp_path / "model", model.config) as writer:
        writer.write(tree)
    with pytest.raises(CheckpointError, match=r"lacks a parameter.*layers/2/self_attn/indexer/wk/"):
        load(tmp_path / "model")


def data_files(path):
    """Files that hold numbers or the index of them, largest first."""
    files = [f for f in (path / "params").rglob("*") if f.is_file() and f.stat().st_size]
    return sorted(files, key=lambda file: -file.stat().st_size)


def test_a_truncated_file_is_reported_and_a_lost_leaf_named(copy):
    file = data_files(copy)[0]
    with open(file, "r+b") as f:
        f.truncate(int(file.stat().st_size * 0.9))
    lost = set()
    reader = checkpoint.CheckpointReader(copy)
    for name, leaf in reader.leaves.items():
        try:
            reader.read({name: leaf})
        except CheckpointError:
            lost.add("/".join(name))
    with pytest.raises(CheckpointError, match="model is damaged: could not read ") as caught:
        load(copy)
    named = str(caught.value).split("could not read ")[1].split(":")[0]
    assert named in lost
    assert "embed_tokens/weight" not in lost  # the first to be read is not the one to be named


def test_any_truncated_or_missing_file_is_reported_or_harmless(model, copy):
    """Orbax keeps some files that a reader does not need: losing those must change nothing."""
    reported = 0
    for file in data_files(copy):
        whole = file.read_bytes()
        for content in (whole[: len(whole) // 3], None):
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
            try:
                assert_equal(load(copy, dtype=jnp.float32), model)
            except CheckpointError:
                reported += 1
            file.write_bytes(whole)
    assert reported >= 5
    assert_equal(load(copy, dtype=jnp.float32), model)


def test_orbax_alone_can_read_it(model, saved):
    """The format is Orbax's: other tools need nothing of ours."""
    tree = ocp.load(str(saved / "params"))
    weight = tree["layers"]["1"]["mlp"]["experts"]["up_proj"]
    np.testing.assert_array_equal(weight, model.stacks[1].blocks[0].mlp.experts.up_proj[...][0])
