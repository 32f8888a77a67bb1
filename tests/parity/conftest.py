"""The parity tests need torch and transformers; without them each is skipped, saying so."""

from __future__ import annotations

import importlib.util
import os

import pytest

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # compared on the CPU, whatever is there
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if "parity" in item.path.parts:
            item.add_marker(pytest.mark.parity)
            if MISSING:
                reason = f"needs {' and '.join(MISSING)}: make parity, or the extra 'parity'"
                item.add_marker(pytest.mark.skip(reason=reason))
