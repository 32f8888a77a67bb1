"""The backward kernels of sparse attention compiled for an H100 (ring 2)."""

import pytest

from pallas_kernels.sparse_attention import backward_sm90
from tests import aot


@pytest.mark.aot
@pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin")
@pytest.mark.parametrize("name", ["deepseek", "heads_16", "no_rope", "narrow"])
def test_compiles(name):
    report = aot.report(f"tests.pallas_kernels.aot_sparse_backward:{name}")
    assert report.registers <= 168
    assert report.spill_bytes == 0
    assert not report.serialized_wgmma
    # One window, dKV before and after it in fp32, and what XLA keeps of the arguments.
    assert report.temp_bytes <= backward_sm90.WORKSPACE_BYTES + 2 * 2**30
