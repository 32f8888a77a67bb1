"""The forward kernel of sparse attention compiled for an H100 (ring 2)."""

import pytest

from tests import aot

# 112 registers of queries and 32 of scores leave 40 of the 184, 128 of output 32 of the 160. What
# spills are a few addresses, once a query.
SPILL_BYTES = {"deepseek": 8, "heads_16": 8, "no_rope": 0, "narrow": 0}


@pytest.mark.aot
@pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin")
@pytest.mark.parametrize("name", SPILL_BYTES)
def test_compiles(name):
    report = aot.report(f"tests.pallas_kernels.aot_sparse_forward:{name}")
    assert report.registers <= 168
    assert report.spill_bytes <= SPILL_BYTES[name]
    assert not report.serialized_wgmma
