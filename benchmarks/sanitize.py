"""Runs kernels once at small sizes, for compute-sanitizer: those of the indexer, and sparse ones.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
compute-sanitizer --tool racecheck python -m benchmarks.sanitize indexer
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    KeyRange,
    Selection,
    indexer_kl_sparse,
    indexer_scores,
    lightning_indexer,
    sparse_attention,
)
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


def sparse() -> None:
    """Sparse attention, the sparse KL and their gradients, with indices of every kind outside."""
    rng = np.random.default_rng(0)
    batch, queries, keys, selected, heads, latent, rope = 2, 3, 301, 200, 128, 512, 64
    indices = np.full((batch, queries, selected), -1, np.int32)
    for row, (b, t) in enumerate(np.ndindex(batch, queries)):
        count = [selected, 0, 77, 1][row % 4]
        indices[b, t, :count] = np.sort(rng.choice(keys, count, replace=False))
    outside = [keys, -2, 2**31 - 1, -(2**31), keys + 1]
    indices[:, 0, 3::7] = np.resize(outside, indices[:, 0, 3::7].shape)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q, kv = normal(batch, queries, heads, latent + rope), normal(batch, keys, latent + rope)
    iq, ik, iw = (
        normal(batch, queries, 64, 128),
        normal(batch, keys, 128),
        normal(batch, queries, 64),
    )
    weights = normal(batch, queries, heads, latent)

    def gradients(iq, ik, iw, q, kv, weights, indices, implementation):
        options = {"scale": 0.05, "implementation": implementation}
        selection = Selection(indices)

        def loss(iq, ik, iw, q, kv):
            out, lse = sparse_attention(q, kv, selection, value_width=latent, **options)
            kl = indexer_kl_sparse(iq, ik, iw, q, kv, lse, selection, **options)
            seen = jnp.where(jnp.isfinite(lse), lse, 0.0)
            return (out.astype(jnp.float32) * weights).sum() + seen.sum() + kl.sum()

        return jax.grad(loss, argnums=range(5))(iq, ik, iw, q, kv)

    def run(implementation, dtype):
        narrow = [jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (iq, ik, q, kv)]
        arguments = (*narrow[:2], iw, *narrow[2:], weights, indices)
        found = jax.jit(gradients, static_argnums=7)(*arguments, implementation)
        return [np.asarray(x, np.float32) for x in found]

    found = run("mosaic", jnp.bfloat16)
    with jax.default_device(jax.devices("cpu")[0]):  # where nothing is checked, and so fast
        expected = run("xla", jnp.float32)
    for one, other in zip(found, expected, strict=True):
        # Products, rows and results are rounded to bf16.
        assert np.linalg.norm(one - other) < 2**-6 * np.linalg.norm(other)


PARTS = {
    "topk": (topk,),
    "indexer": (lambda: indexer("float8_e4m3fn", 64), lambda: indexer("bfloat16", 16)),
    "sparse": (sparse,),
}


def main() -> None:
    """Runs those that the arguments name, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    for name in parser.parse_args().parts or PARTS:
        for part in PARTS[name]:
            part()
        print(f"{name}: results right", flush=True)


if __name__ == "__main__":
    main()
