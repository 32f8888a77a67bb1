"""The kernels of training compiled for an H100 (ring 2): spills, asynchronous wgmma, memory."""

import pytest

from tests import aot

# 192 bytes: the gradient of keys and values holds 160 sums and 80 of scores and weights a thread.
SPILL_BYTES = {
    "dense_attention:forward": 0,
    "dense_attention:forward_256": 0,
    "dense_attention:forward_128": 0,
    "dense_attention:backward": 192,
    "dense_attention:backward_128": 40,
    "grouped_matmul:rows": 0,
    "grouped_matmul:rows_transposed": 0,
    "grouped_matmul:weights": 0,
    # Scores and sums of the target take 192 of 240 registers: addresses spill.
    "indexer_loss:dense": 24,
    "indexer_loss:dense_value": 24,
    "indexer_loss:dense_width_64": 24,
    "sparse_kl:deepseek": 0,
    "sparse_kl:value": 0,
    "sparse_kl:odd": 0,
    "sparse_kl:far": 0,
}

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin"),
]


@pytest.mark.parametrize("name", SPILL_BYTES)
def test_compiles(name):
    report = aot.report(f"tests.pallas_kernels.aot_{name}")
    assert report.registers <= 168  # at launch; consumers then take 240
    assert report.spill_bytes <= SPILL_BYTES[name]
    assert not report.serialized_wgmma


def test_memory_of_the_warm_up_loss():
    """At 128K tokens: the window's scores and what is as long as T or S; one [T, S] is 64 GiB."""
    report = aot.report("tests.pallas_kernels.aot_indexer_loss:long")
    # lse once more (64 MiB), diq of all windows (2 GiB), dik in parts (64 MiB each).
    assert report.temp_bytes < 2**30 + 3 * 2**30
