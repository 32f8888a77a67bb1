"""The quickstart's Python runs as it is printed."""

import re
from pathlib import Path

import dsa_jax

QUICKSTART = Path(dsa_jax.__file__).parents[1] / "docs" / "quickstart.md"


def test_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", QUICKSTART.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(QUICKSTART), "exec"), names)
    assert (tmp_path / "my-model" / "config.json").is_file()
