"""Hugging Face checkpoints: every bit there and back, and clear words about what is wrong."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import assert_same_bits, fp8_config, random_tensors, read_file, read_hf, write_hf
from small_models import filled, jit, tokens_of

import convert
import dsa_jax
from convert import ConvertError, hf_to_orbax, orbax_to_hf, ours, weights
from convert.weights import BF16, E4M3
from dsa_jax import presets
from dsa_jax.layer_tree import flatten
from dsa_jax.quantization import weight_dequant, weight_quant
from dsa_jax.store import CheckpointError, CheckpointReader

ROOT = Path(convert.__file__).parents[1]
CONFIG = fp8_config()


@pytest.fixture(scope="module")
def content():
    return random_tensors(CONFIG)


@pytest.fixture(scope="module")
def published(content, tmp_path_factory):
    folder = write_hf(tmp_path_factory.mktemp("published") / "hf", CONFIG, content)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def converted(published):
    hf_to_orbax(published, published.parent / "ours")
    return published.parent / "ours"


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny-shared"])
def test_a_float_model_there_and_back(name, tmp_path):
    model = filled(presets.get(name))
    dsa_jax.save(model, tmp_path / "ours")
    orbax_to_hf(tmp_path / "ours", tmp_path / "hf")
    hf_to_orbax(tmp_path / "hf", tmp_path / "again")
    loaded = dsa_jax.load(tmp_path / "again", dtype=jnp.float32)
    assert loaded.config == model.config
    again = flatten(loaded)
    for path, leaf in flatten(model).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(again[path]), err_msg=str(path))


def test_fp8_with_its_scales_and_the_extra_layer_keep_every_bit(content, converted, tmp_path):
    orbax_to_hf(converted, tmp_path / "back", shard_bytes=300_000)
    assert_same_bits(read_hf(tmp_path / "back"), content)
    files = sorted(path for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        assert sum(x.nbytes for x in read_file(file).values()) <= 300_000
        assert file.name.endswith(f"-of-{len(files):05d}.safetensors")
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == CONFIG.to_hf()


def test_ours_is_the_transpose(content, converted):
    reader = CheckpointReader(converted)
    weight = reader.read_local(("layers", "1", "self_attn", "q_a_proj", "weight"))
    theirs = content["model.layers.1.self_attn.q_a_proj.weight"]
    assert weight.tobytes() == np.ascontiguousarray(theirs.T).tobytes()
    experts = reader.read_local(("layers", "2", "mlp", "experts", "down_proj"))
    theirs = content["model.layers.2.mlp.experts.5.down_proj.weight"]
    assert experts[5].tobytes() == np.ascontiguousarray(theirs.T).tobytes()


def test_small_pieces_change_nothing(content, published, tmp_path, monkeypatch):
    """Leaves cut over all devices, in groups and stripes of a few rows, as large ones are."""
    monkeypatch.setattr(ours, "_PIECE_BYTES", 20_000)
    monkeypatch.setattr(ours, "_GROUP_BYTES", 300_000)
    monkeypatch.setattr(weights, "_STRIPE", 5000)
    hf_to_orbax(published, tmp_path / "ours")
    orbax_to_hf(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(read_hf(tmp_path / "back"), content)
    hf_to_orbax(published, tmp_path / "bf16", dtype="bf16")
    monkeypatch.undo()
    hf_to_orbax(published, tmp_path / "whole", dtype="bf16")
    orbax_to_hf(tmp_path / "bf16", tmp_path / "a")
    orbax_to_hf(tmp_path / "whole", tmp_path / "b")
    assert_same_bits(read_hf(tmp_path / "a"), read_hf(tmp_path / "b"))


def test_a_nan_keeps_its_bits(content, tmp_path):
    name = "model.layers.0.self_attn.q_a_proj.weight"
    odd = content[name].copy()
    odd.view(np.uint8)[3, 5] = 0xFF
    norm = np.array(content["model.norm.weight"])
    norm.view(np.uint16)[7] = 0x7F81  # a signalling NaN
    content = content | {name: odd, "model.norm.weight": norm}
    hf_to_orbax(write_hf(tmp_path / "hf", CONFIG, content), tmp_path / "ours")
    orbax_to_hf(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(read_hf(tmp_path / "back"), content)


def test_the_extra_layer_can_be_left_out(content, published, converted, tmp_path):
    layer = f"model.layers.{CONFIG.num_hidden_layers}."
    main = {name: x for name, x in content.items() if not name.startswith(layer)}
    orbax_to_hf(converted, tmp_path / "a", mtp=False)
    assert_same_bits(read_hf(tmp_path / "a"), main)
    hf_to_orbax(published, tmp_path / "b", mtp=False)
    assert dsa_jax.load_config(tmp_path / "b").num_nextn_predict_layers == 0
    # transformers saves without it, but its config still speaks of it.
    write_hf(tmp_path / "hf", CONFIG, main)
    assert hf_to_orbax(tmp_path / "hf", tmp_path / "c").num_nextn_predict_layers == 0


# --- other dtypes ---------------------------------------------------------------------------------


def product(content, name, dtype):
    """A weight times its scales, computed in float64."""
    q, s = (content[n].astype(np.float64) for n in (f"{name}.weight", f"{name}.weight_scale_inv"))
    wide = np.repeat(np.repeat(s, 128, 0), 128, 1)[: q.shape[0], : q.shape[1]]
    return (q * wide).astype(np.float32).astype(dtype)


@pytest.mark.parametrize(("dtype", "numpy"), [("bf16", BF16), ("fp32", np.float32)])
def test_fp8_to_float(dtype, numpy, content, published, tmp_path):
    config = hf_to_orbax(published, tmp_path / "ours", dtype=dtype)
    assert config.fp8_weights is None
    assert config.numerics == CONFIG.numerics
    orbax_to_hf(tmp_path / "ours", tmp_path / "hf")
    found = read_hf(tmp_path / "hf")
    assert not [name for name in found if name.endswith("_scale_inv")]
    for name in (
        "model.layers.0.self_attn.kv_a_proj_with_mqa",  # 136 rows: the last tile is ragged
        "model.layers.1.mlp.experts.7.gate_proj",
        "model.layers.3.self_attn.indexer.wq_b",
    ):
        wanted = product(content, name, numpy)
        assert found[f"{name}.weight"].tobytes() == wanted.tobytes()
    assert found["model.layers.0.self_attn.indexer.k_norm.weight"].dtype == np.float32
    assert found["model.embed_tokens.weight"].dtype == numpy


def test_dequantised_on_load_is_dequantised_on_disk(published, converted, tmp_path):
    hf_to_orbax(published, tmp_path / "bf16", dtype="bf16")
    on_disk = dsa_jax.load(tmp_path / "bf16")
    on_load = dsa_jax.load(converted, param_dtype=jnp.bfloat16)
    a, b = flatten(on_disk), flatten(on_load)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=str(name))


def test_kept_fp8_runs(published, converted):
    """As it is, with FP8 products; and near what the same weights give in bf16."""
    model = dsa_jax.load(converted, dtype=jnp.float32)
    assert model.stacks[0].blocks[0].self_attn.o_proj.weight[...].dtype == E4M3
    tokens = tokens_of(CONFIG, 1, 12)
    logits = jit(lambda model, tokens: model(tokens).logits)(model, tokens)
    assert np.isfinite(logits).all()


def test_float_to_fp8_is_the_model_s_own_rule_and_its_error_is_that_of_e4m3(tmp_path):
    config = CONFIG.replace(fp8_weights=None, num_nextn_predict_layers=0)
    model = filled(config)
    dsa_jax.save(model, tmp_path / "ours")
    written = orbax_to_hf(tmp_path / "ours", tmp_path / "hf", dtype="fp8")
    assert written.fp8_weights.scale_format == "ue8m0"
    found = read_hf(tmp_path / "hf")
    w = model.stacks[0].blocks[0].self_attn.kv_a_proj_with_mqa.weight[...][0]
    q, scale = weight_quant(w, (128, 128), "ue8m0")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert found[name].tobytes() == np.asarray(q).T.tobytes()
    np.testing.assert_array_equal(found[f"{name}_scale_inv"], np.asarray(scale).T)
    back = weight_dequant(q, scale, (128, 128), jnp.float32)
    # e4m3 keeps 3 bits after the leading one: half a step is 1/16 of the number, or of the least
    # normal one, 2^-6 times the scale.
    spread = np.repeat(np.repeat(scale, 128, 0), 128, 1)[: w.shape[0], : w.shape[1]]
    assert (np.abs(back - w) <= np.maximum(np.abs(w), 2.0**-6 * spread) / 16).all()


def test_fp8_to_bf16_to_fp8_returns_the_same_numbers(content, published, tmp_path):
    """Powers of two as scales: products are exact in bf16, so a second rounding changes nothing."""
    hf_to_orbax(published, tmp_path / "bf16", dtype="bf16")
    orbax_to_hf(tmp_path / "bf16", tmp_path / "fp8", dtype="fp8")
    found = read_hf(tmp_path / "fp8")
    for name in ("model.layers.1.mlp.experts.7.gate_proj", "model.layers.0.self_attn.o_proj"):
        np.testing.assert_array_equal(
            product(found, name, np.float32), product(content, name, np.float32)
        )


# --- what is wrong is named, and nothing is written -----------------------------------------------

WEIGHT = "model.layers.1.self_attn.q_b_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"


def change(content, name, value):
    return {k: v for k, v in (content | {name: value}).items() if v is not None}


BAD = {
    "missing tensor": ("model.layers.2.mlp.gate.weight", lambda x: None, r"missing tensor {}"),
    "missing scale": (SCALE, lambda x: None, r"{}: .*q_b_proj.weight is in FP8, but .*missing"),
    "unknown tensor": ("model.layers.0.q_c.weight", lambda x: np.ones(3, BF16), r"is not one"),
    "wrong shape": ("model.norm.weight", lambda x: x[:-1], r"shape \[127\].* asks for \[128\]"),
    "wrong dtype": (WEIGHT, lambda x: x.astype(np.float32), r"scales a weight that is not in FP8"),
    "FP8 where none is": ("model.norm.weight", lambda x: x.astype(E4M3), r"is float8_e4m3fn"),
    "mixed experts": (
        "model.layers.1.mlp.experts.3.up_proj.weight", lambda x: x.astype(BF16),
        r"experts.3.up_proj.weight is bfloat16, but .*experts.0",
    ),
    "wrong scale shape": (SCALE, lambda x: x[:, :0], r"scales of this weight are float32\[1, 1\]"),
    "wrong scale dtype": (SCALE, lambda x: x.astype(BF16), r"is bfloat16\[1, 1\]"),
    "NaN scale": (SCALE, lambda x: np.where(x == x.max(), np.nan, x), r"{} holds nan"),
    "infinite scale": (SCALE, lambda x: x * np.inf, r"{} holds inf"),
    "negative scale": (SCALE, lambda x: -x, r"{} holds -"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_tensors(kind, content, tmp_path):
    name, make, message = BAD[kind]
    value = make(content.get(name))
    if value is not None and kind in ("NaN scale", "infinite scale"):
        value = value.astype(np.float32)
    write_hf(tmp_path / "hf", CONFIG, change(content, name, value))
    with pytest.raises(ConvertError, match=message.format(".*")) as caught:
        hf_to_orbax(tmp_path / "hf", tmp_path / "ours")
    assert name.removesuffix("_scale_inv") in str(caught.value)
    assert str(tmp_path / "hf") in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_some_weights_in_fp8_and_some_not(content, tmp_path):
    float_one = content[WEIGHT].astype(BF16)
    write_hf(tmp_path / "hf", CONFIG, change(change(content, WEIGHT, float_one), SCALE, None))
    with pytest.raises(ConvertError, match=r"q_b_proj.weight is bfloat16, but .* in FP8.*Convert"):
        hf_to_orbax(tmp_path / "hf", tmp_path / "ours")
    hf_to_orbax(tmp_path / "hf", tmp_path / "ours", dtype="bf16")


def test_fp8_without_a_layout(content, tmp_path):
    write_hf(tmp_path / "hf", CONFIG.replace(fp8_weights=None), content)
    with pytest.raises(ConvertError, match="no quantization_config"):
        hf_to_orbax(tmp_path / "hf", tmp_path / "ours")


@pytest.fixture
def copy(published, tmp_path):
    shutil.copytree(published, tmp_path / "hf")
    return tmp_path / "hf"


def refuse(folder, error, message):
    with pytest.raises(error, match=message):
        hf_to_orbax(folder, folder.parent / "ours")
    assert {path.name for path in folder.parent.iterdir()} == {"hf"}


def test_a_truncated_shard(copy):
    file = copy / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    refuse(copy, ConvertError, r"00002-of-00003.safetensors: tensor .* cut short")


def test_a_missing_shard(copy):
    (copy / "model-00002-of-00003.safetensors").unlink()
    refuse(copy, FileNotFoundError, r"model-00002-of-00003.safetensors is missing")


def test_a_tensor_twice(copy):
    shutil.copyfile(copy / "model-00001-of-00003.safetensors", copy / "more.safetensors")
    (copy / "model.safetensors.index.json").unlink()
    refuse(copy, ConvertError, r"duplicate tensor .*00001-of-00003.* and in .*more.safetensors")


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/f.safetensors", "..", ""]
)
def test_an_index_that_points_outside_its_folder(copy, file):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = file
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(copy, ConvertError, r"lm_head.weight into .* outside its own folder; refused")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(copy, text):
    (copy / "model.safetensors.index.json").write_text(text)
    refuse(copy, ConvertError, r"index.json")


def test_an_index_that_lies(copy):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    first, last = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
    index["weight_map"] = {n: last if f == first else f for n, f in index["weight_map"].items()}
    index["weight_map"]["lm_head.weight"] = first
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(copy, ConvertError, r"index.json puts tensor .* which lacks it")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        hf_to_orbax(tmp_path / "hf", tmp_path / "ours")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    refuse(tmp_path / "hf", ConvertError, "holds no safetensors file")


@pytest.mark.parametrize("target", ["folder", "file", "broken link"])
def test_a_destination_that_exists(target, published, converted, tmp_path):
    path = tmp_path / "there"
    if target == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("precious")
    elif target == "file":
        path.write_text("precious")
    else:
        path.symlink_to(tmp_path / "gone")
    for convert_it, source in ((hf_to_orbax, published), (orbax_to_hf, converted)):
        with pytest.raises(FileExistsError, match="there exists; choose another path"):
            convert_it(source, path)
    assert os.path.lexists(path)
    assert target != "folder" or (path / "thesis.tex").read_text() == "precious"


def test_a_damaged_checkpoint_of_ours(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "ours")
    file = max((tmp_path / "ours").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="is damaged: could not read"):
        orbax_to_hf(tmp_path / "ours", tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


# --- interruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["hf-to-orbax", "orbax-to-hf"])
def test_a_kill_leaves_nothing_that_loads_and_the_next_run_tidies_up(
    command, published, converted, content, tmp_path
):
    """Killed as soon as it has begun to write; the same command then starts afresh."""
    source = published if command == "hf-to-orbax" else converted
    arguments = [sys.executable, "-m", "convert", command, str(source), str(tmp_path / "made")]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not list(tmp_path.glob("made.writing-*/*")) and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "made").exists()
    assert len(list(tmp_path.glob("made.writing-*"))) == 1
    if command == "hf-to-orbax":
        hf_to_orbax(source, tmp_path / "made")
        orbax_to_hf(tmp_path / "made", tmp_path / "back")
    else:
        orbax_to_hf(source, tmp_path / "made")
    assert not list(tmp_path.glob("made.writing-*"))
    made = tmp_path / ("back" if command == "hf-to-orbax" else "made")
    assert_same_bits(read_hf(made), content)


def test_another_writer_s_work_is_left_alone(converted, tmp_path):
    """Only what dead writers left is removed."""
    from dsa_jax.folder import NewFolder

    with NewFolder(tmp_path / "made") as living:
        (living.folder / "x").write_text("x")
        orbax_to_hf(converted, tmp_path / "made")
        assert (living.folder / "x").read_text() == "x"
        shutil.rmtree(tmp_path / "made")
    assert (tmp_path / "made" / "x").is_file()


def test_an_error_in_the_middle_leaves_nothing(content, tmp_path):
    """A NaN among the last layer's scales is met after most has been written."""
    name = f"model.layers.{CONFIG.num_hidden_layers}.self_attn.o_proj.weight_scale_inv"
    bad = np.full_like(content[name], np.nan)
    write_hf(tmp_path / "hf", CONFIG, content | {name: bad})
    with pytest.raises(ConvertError, match=f"{name} holds nan"):
        hf_to_orbax(tmp_path / "hf", tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_memory_stays_small_while_a_file_is_read(tmp_path):
    """Rows of a large tensor are given back as the next ones are read."""
    from convert.safetensors import SafetensorsFile, SafetensorsWriter

    rows, columns = 4096, 2**14
    writer = SafetensorsWriter(tmp_path / "f", {"x": (np.dtype(np.uint8), (rows, columns))})
    for start in range(0, rows, 512):
        writer.write("x", start, np.full((512, columns), start % 251, np.uint8))
    writer.close()
    file = SafetensorsFile(tmp_path / "f")

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    before, most, total = resident(), 0, 0
    for stripe in weights.stripes(range(rows), 2**17, 1):  # 128 rows, 2 MiB
        total += int(file.read("x", stripe).sum())
        most = max(most, resident() - before)
    assert total == columns * 512 * sum(start % 251 for start in range(0, rows, 512))
    assert math.prod((rows, columns)) == 2**26
    assert most < 2**24  # of 64 MiB
