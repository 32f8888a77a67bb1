"""The command that puts both side by side."""

import pytest

from convert import compare as comparison
from convert import hf_to_orbax, orbax_to_hf
from convert.__main__ import main
from convert.compare import compare
from tests.parity import random_models


def test_command(tmp_path, capsys):
    random_models.save("deepseek_v3", tmp_path / "hf")
    assert main(["compare", str(tmp_path / "hf"), "--dtype", "fp32", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| this package | by |")
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert names[0] == "as transformers"
    assert "FP8 round trip of the latent" in names
    assert "Hadamard rotation alone" not in names  # a dense model has no indexer
    assert float(lines[2].split(" | ")[4]) < 1e-4


def test_fp8_checkpoint(tmp_path, monkeypatch):
    """Both sides see the dequantised weights."""
    random_models.save("deepseek_v32", tmp_path / "hf")
    hf_to_orbax(tmp_path / "hf", tmp_path / "ours", dtype="fp8")
    orbax_to_hf(tmp_path / "ours", tmp_path / "fp8")
    every = comparison.cases
    monkeypatch.setattr(comparison, "cases", lambda config: every(config)[:1])
    told = []
    (line,) = compare(tmp_path / "fp8", dtype="fp32", length=40, report=told.append)
    assert line.model.logits < 1e-4  # fp32 through the whole model, as in test_fp32
    assert line.model.keys == 1.0
    assert "running transformers" in told


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config"):
        compare(tmp_path / "nothing")
