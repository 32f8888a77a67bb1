"""The scores kernel compiled for an H100 (ring 2): registers, spills, wgmma left asynchronous."""

import pytest

from tests import aot

# 64 accumulators and 32 weights leave 14 registers of the 112. What spills are addresses and ranges
# of a block of queries, reloaded once a tile of keys; fewer heads mean more tokens, more of them.
SPILL_BYTES = {
    "e4m3": 24,
    "e4m3_32_heads": 48,
    "e4m3_16_heads": 80,
    "e4m3_width_64": 8,
    "bf16": 8,
}


@pytest.mark.aot
@pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin")
@pytest.mark.parametrize("name", SPILL_BYTES)
def test_compiles(name):
    report = aot.report(f"tests.pallas_kernels.aot_scores:{name}")
    assert report.registers <= 96
    assert report.spill_bytes <= SPILL_BYTES[name]
    assert not report.serialized_wgmma
