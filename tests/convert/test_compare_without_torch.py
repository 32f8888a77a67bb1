"""Without torch the command says what to install, and nothing else needs it."""

import importlib

import pytest

from convert import compare
from convert.__main__ import main


@pytest.fixture
def no_torch(monkeypatch):
    real = importlib.import_module

    def missing(name, *rest):
        if name in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(compare.importlib, "import_module", missing)


def test_the_error_names_the_extra(no_torch, tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 1
    assert "pip install 'dsa-jax[parity]'" in " ".join(capsys.readouterr().err.split())
