"""Runs the indexer's kernels once at small sizes, for compute-sanitizer.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
compute-sanitizer --tool racecheck python -m benchmarks.sanitize
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels import KeyRange, indexer_scores, lightning_indexer
from pallas_kernels.lightning_indexer import topk_sm90
from tests.pallas_kernels.topk_rows import best, hard_ranges, hard_rows


def indexer(dtype: str, heads: int) -> None:
    """Scores and a selection in three windows, of sizes that no tile divides."""
    rng = np.random.default_rng(0)
    queries, keys, width = 41, 333, 128
    q = jnp.asarray(rng.standard_normal((2, queries, heads, width)).astype(np.float32)).astype(
        dtype
    )
    k = jnp.asarray(rng.standard_normal((2, keys, width)).astype(np.float32)).astype(dtype)
    w = jnp.asarray(rng.standard_normal((2, queries, heads)).astype(np.float32))
    scale = jnp.asarray(rng.uniform(0.5, 2.0, (2, keys)).astype(np.float32))
    ranges = KeyRange.causal(2, queries, offset=150)
    kernels = {"k_scale": scale, "implementation": "mosaic"}
    scores = np.asarray(indexer_scores(q, k, w, ranges, **kernels))
    options = {"topk": 64, "workspace_bytes": 2**16, **kernels}
    found = np.asarray(lightning_indexer(q, k, w, ranges, **options).indices)
    for b in range(2):
        ends = np.asarray(ranges.end[b])
        np.testing.assert_array_equal(found[b], best(scores[b], np.zeros_like(ends), ends, 64))


def topk() -> None:
    """Rows that are streamed, held whole, and cut into segments."""
    for width, sizes in (
        (5001, {"threads": 128, "vectors": 2, "capacity": 2048, "sample": 1024}),
        (5001, {}),
        (6003, {"threads": 128, "vectors": 2, "capacity": 2048, "sample": 1024, "parts": 2}),
    ):
        names = {"normal", "ascending", "relu plateau", "mostly NaN", "all equal"}
        rows = np.stack([row for name, row in hard_rows(width) if name in names])
        bounds = hard_ranges(len(rows), width)
        arguments = [jnp.asarray(x) for x in (rows, *bounds)]
        got = np.asarray(topk_sm90.select_rows(*arguments, topk=300, **sizes))
        np.testing.assert_array_equal(got, best(rows, *bounds, 300))


def main() -> None:
    """Runs all of them."""
    topk()
    indexer("float8_e4m3fn", 64)
    indexer("bfloat16", 16)
    print("results right")


if __name__ == "__main__":
    main()
