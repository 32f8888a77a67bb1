"""The scores kernel compiled for an H100 (ring 2): registers, spills, wgmma left asynchronous."""

import pytest

from tests import aot

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin"),
]

# 64 accumulators and 32 weights leave 14 registers of the 112. Where S is a multiple of 64, the
# loop over tiles of keys touches no local memory: what spills is read once a block of queries.
# Else each tile reads a bound again. Fewer heads mean more tokens, with a key range each: those of
# 16 heads are read from local memory for each tile, as they would be from shared memory.
SPILL_BYTES = {
    "e4m3": 12,
    "e4m3_32_heads": 12,
    "e4m3_16_heads": 64,
    "e4m3_width_64": 12,
    "bf16": 12,
    "e4m3_whole_tiles": 4,
    "decode": 0,
    "decode_bf16_16_heads": 64,
}


@pytest.mark.parametrize("name", SPILL_BYTES)
def test_compiles(name):
    report = aot.report(f"tests.pallas_kernels.aot_scores:{name}")
    assert report.registers <= 96
    assert report.spill_bytes <= SPILL_BYTES[name]
    assert not report.serialized_wgmma


def test_prefill_fits_its_workspace():
    """131072 queries over as many keys, in one call: the default workspace and 2 MiB beside it."""
    report = aot.report("tests.pallas_kernels.aot_scores:prefill")
    assert report.temp_bytes <= 514 * 2**20
    assert not report.serialized_wgmma
