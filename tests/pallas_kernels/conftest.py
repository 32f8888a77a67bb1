"""What the op tests share: which implementation runs, and how its blocks are cut."""

from __future__ import annotations

import itertools
import os

import pytest

from pallas_kernels import tiling

_unused_budgets = itertools.count(10_000)


@pytest.fixture
def implementation() -> str:
    """The implementation under test: `DSA_TEST_IMPLEMENTATION=mosaic` tests the kernels."""
    return os.environ.get("DSA_TEST_IMPLEMENTATION", "xla")


@pytest.fixture(params=["whole", "queries", "all"])
def workspace_bytes(request, monkeypatch) -> int:
    """A budget under which the XLA ops run whole, or cut into queries, or queries, heads and rows.

    5 divides none of the tests' T, so the last block overlaps the one before. The plan is put in
    place of the one the budget would give; each budget is new because results of tracing are kept.
    """
    if request.param == "whole":
        return tiling.WORKSPACE_BYTES

    def plan(*, batch, heads=1, **_):
        if request.param == "queries":
            return tiling.Plan(batch, heads, 5)
        return tiling.Plan(1, max(1, heads // 2), 5)

    monkeypatch.setattr(tiling, "plan", plan)
    return next(_unused_budgets)
