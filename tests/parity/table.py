"""Measures the tables of docs/parity.md and writes them there: `python -m tests.parity.table`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from convert.compare import compare, markdown, torch_modules
from tests.parity.random_models import save

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
TABLES = (("deepseek_v32", "fp32"), ("deepseek_v32", "bf16"), ("glm-5", "bf16"))


def measured(name: str, dtype: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        save(name, Path(folder) / "hf", dtype, update=0.25)
        lines = compare(Path(folder) / "hf", dtype=dtype, length=72, batch=2, report=print)  # type: ignore[arg-type]
    return markdown(lines)


def main() -> None:
    torch, transformers = torch_modules()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    text = PAGE.read_text("utf-8")
    for name, dtype in TABLES:
        begin, end = f"<!-- {name} {dtype} -->", f"<!-- end {name} {dtype} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        table = f"{name}, {dtype}; {versions}, CPU.\n\n{measured(name, dtype)}"
        text = f"{before}{begin}\n{table}\n{end}{after}"
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
