"""The command-line program: every command once, its errors, and what `inspect` sees."""

import json
import os

import pytest
from checkpoints import assert_same_bits, fp8_config, random_tensors, read_hf, write_hf

from convert import inspect
from convert.__main__ import main
from dsa_jax import param_count

CONFIG = fp8_config(num_hidden_layers=2)


@pytest.fixture(scope="module")
def content():
    return random_tensors(CONFIG)


@pytest.fixture(scope="module")
def published(content, tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("main") / "hf", CONFIG, content)


def test_there_through_the_demo_and_back(published, content, tmp_path, capsys):
    def run(command, source, destination, *options):
        assert main([command, str(source), str(tmp_path / destination), *options]) == 0
        assert destination in capsys.readouterr().err
        return tmp_path / destination

    ours = run("hf-to-orbax", published, "ours")
    assert_same_bits(read_hf(run("orbax-to-hf", ours, "hf")), content)
    demo = run("orbax-to-demo", ours, "demo", "--parallel", "1")
    again = run("demo-to-orbax", demo, "again", "--dtype", "bf16")
    assert main(["inspect", str(again)]) == 0
    dense = CONFIG.without_indexer()
    write_hf(tmp_path / "dense", dense, random_tensors(dense))
    sizes = ("--index-n-heads", "6", "--index-topk", "8")
    run("add-indexer", tmp_path / "dense", "sparse", *sizes)


def test_errors_are_one_line_and_a_status(published, tmp_path, capsys):
    assert main(["hf-to-orbax", str(tmp_path / "none"), str(tmp_path / "ours")]) == 1
    assert "FileNotFoundError: no checkpoint at" in capsys.readouterr().err
    assert main(["hf-to-orbax", str(published), str(tmp_path)]) == 1
    assert "FileExistsError" in capsys.readouterr().err
    shards = ["orbax-to-hf", str(tmp_path), str(tmp_path / "hf"), "--shard-bytes", "0"]
    assert main(shards) == 1
    assert "ConvertError: shard_bytes=0 must be at least 1" in capsys.readouterr().err
    alone = ["hf-to-orbax", str(published), str(tmp_path / "ours")]
    assert main([*alone, "--coordinator", "host:1"]) == 1
    assert "--coordinator host:1 says nothing without --distributed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*alone, "--dtype", "fp4"])


def test_inspect_counts(published, content, capsys):
    found = inspect(published)
    count = param_count(CONFIG)
    assert found.ok
    assert (found.kind, found.tensors) == ("hf", len(content))
    assert (found.parameters, found.scales) == (count.main + count.mtp, count.scales)
    assert sum(found.nbytes.values()) == sum(x.nbytes for x in content.values())
    assert main(["inspect", str(published)]) == 0
    out = capsys.readouterr().out
    assert f"{count.main + count.mtp:,}" in out
    assert "float8_e4m3fn" in out


def test_inspect_names_what_is_wrong(content, tmp_path, capsys):
    gone, changed = "model.layers.1.mlp.gate.weight", "model.norm.weight"
    scale = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    bad = {name: x for name, x in content.items() if name not in (gone, scale)}
    bad |= {changed: content[changed][1:], "model.extra": content[changed]}
    write_hf(tmp_path / "hf", CONFIG, bad)
    found = inspect(tmp_path / "hf")
    assert found.missing == [scale, gone]
    assert found.unexpected == ["model.extra"]
    assert found.misshapen == [changed]
    assert main(["inspect", str(tmp_path / "hf")]) == 1
    assert gone in capsys.readouterr().out


def test_inspect_ours_and_the_demo_s(published, tmp_path):
    main(["hf-to-orbax", str(published), str(tmp_path / "ours")])
    main(["orbax-to-demo", str(tmp_path / "ours"), str(tmp_path / "demo")])
    hf, ours, demo = map(inspect, (published, tmp_path / "ours", tmp_path / "demo"))
    assert (ours.kind, demo.kind) == ("orbax", "demo")
    assert (ours.tensors, ours.parameters, ours.nbytes) == (hf.tensors, hf.parameters, hf.nbytes)
    assert demo.parameters == param_count(CONFIG).main
    assert ours.ok
    assert demo.ok


def test_a_config_of_another_kind(published, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    for file in published.iterdir():
        os.link(file, tmp_path / "hf" / file.name)
    (tmp_path / "hf" / "config.json").unlink()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert main(["hf-to-orbax", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 1
    assert "model_type='llama'" in capsys.readouterr().err.replace("\n", "")
