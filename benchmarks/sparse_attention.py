"""The forward of sparse attention on a GPU: checked against fp32, then timed.

    python -m benchmarks.ops sparse_attention --json FILE

FLOPs are counted as 2 T N K (C + R + C), what a dense product over the selected keys takes. Times
are of the kernel and of the two reductions over the indices before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from pallas_kernels.sparse_attention import forward_sm90, reference

T, N, K, C, R = 4096, 128, 2048, 512, 64
KEYS = (8192, 32768, 131072)
SCALE = (128 + 64) ** -0.5
BLOCK = 64  # queries that draw from the same pool


def random_selections(rng: np.random.Generator, queries: int, keys: int, selected: int):
    """Ascending indices `[1, queries, selected]`: a uniform choice, nothing shared by neighbours.

    Queries 256 apart have the same choice, shifted by a random distance around the keys.
    """
    fresh = min(queries, 256)
    rows = np.stack([rng.choice(keys, selected, replace=False) for _ in range(fresh)])
    rows = np.resize(rows, (queries, selected)) + rng.integers(keys, size=(queries, 1))
    return np.sort(rows % keys, axis=1).astype(np.int32)[None]


def recent_selections(rng: np.random.Generator, queries: int, keys: int, selected: int):
    """Ascending indices nearer to what an indexer picks for the last `queries` of `keys` positions.

    16 sinks, an eighth the latest keys, and the rest out of a pool twice as large that 64
    neighbours have in common: two of them share half of it.
    """
    latest, sinks = selected // 8, 16
    rest = selected - latest - sinks
    rows = np.empty((queries, selected), np.int32)
    rows[:, :sinks] = np.arange(sinks)
    for start in range(0, queries, BLOCK):
        end = keys - queries + start + 1 + np.arange(min(BLOCK, queries - start))[:, None]
        own = rows[start : start + BLOCK]
        own[:, sinks : sinks + latest] = end - latest + np.arange(latest)
        pool = sinks + rng.permutation(int(end[0, 0]) - latest - sinks)[: 2 * rest]
        own[:, sinks + latest :] = pool[rng.random((len(own), len(pool))).argsort(1)[:, :rest]]
    return np.sort(rows, axis=1)[None]


SELECTIONS = {"random": random_selections, "recent": recent_selections}


def inputs(rng, batch, queries, heads, keys, *, width=C + R):
    """bf16 q and kv, standard normal."""
    q = jnp.asarray(rng.standard_normal((batch, queries, heads, width), np.float32), jnp.bfloat16)
    kv = jnp.asarray(rng.standard_normal((batch, keys, width), np.float32), jnp.bfloat16)
    return q, kv


def errors(q, kv, indices, out, lse) -> dict[str, float]:
    """Against fp32 on the same bf16 inputs."""
    expected, expected_lse = reference.forward(
        q.astype(jnp.float32), kv.astype(jnp.float32), indices,
        value_width=C, scale=SCALE, workspace_bytes=2**31,
    )  # fmt: skip
    out = out.astype(jnp.float32)
    finite = jnp.isfinite(expected_lse)
    dot = 2 * jnp.sum(out * expected)
    return {
        "abs": float(jnp.max(jnp.abs(out - expected))),
        "relative": float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)),
        "1-cosine": float(1 - dot / (jnp.sum(out**2) + jnp.sum(expected**2))),
        "lse": float(jnp.max(jnp.where(finite, jnp.abs(lse - expected_lse), 0.0))),
        "empty_differ": int(jnp.sum(jnp.isfinite(lse) != finite)),
    }


def check() -> dict:
    """Errors on 64 queries with 0 to 2048 keys, some of them outside; equal bits of 20 runs."""
    rng = np.random.default_rng()
    q, kv = inputs(rng, 1, 64, N, KEYS[0])
    rows = random_selections(rng, 64, KEYS[0], K)
    count = rng.integers(0, K + 1, 64)
    count[:4] = [0, 1, 64, K]
    rows = np.where(np.arange(K) < count[:, None], rows, -1)
    rows[0, 5, 7] = KEYS[0]
    rows = jnp.asarray(rows)
    found = forward_sm90.forward(q, kv, rows, value_width=C, scale=SCALE)
    equal = 0
    for _ in range(20):
        again = forward_sm90.forward(q, kv, rows, value_width=C, scale=SCALE)
        equal += all(bool(jnp.array_equal(x, y)) for x, y in zip(found, again, strict=True))
    return errors(q, kv, rows, *found) | {"equal_runs": equal}


def measure(kind: str, keys: int, batch: int = 1, queries: int = T) -> dict:
    """Time and rate of one shape."""
    rng = np.random.default_rng(0)
    q, kv = inputs(rng, batch, queries, N, keys)
    rows = SELECTIONS[kind](rng, batch * queries, keys, K).reshape(batch, queries, K)

    def run(q, kv, rows):
        return forward_sm90.forward(q, kv, rows, value_width=C, scale=SCALE)

    time = timing.device_time(run, q, kv, jnp.asarray(rows))
    return {
        "op": "sparse_attention",
        "kind": kind,
        "batch": batch,
        "queries": queries,
        "keys": keys,
        "ms": round(time.median_ms, 4),
        "spread_ms": [round(time.min_ms, 4), round(time.max_ms, 4)],
        "tflops": round(time.tflops(2 * batch * queries * N * K * (2 * C + R)), 1),
    }


def forward(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """Every kind of selection at each number of keys, and decode: a query each of 128 rows."""
    errors = check() if check_at else {}
    for width in keys:
        for kind in SELECTIONS:
            yield measure(kind, width) | (errors if width in check_at else {})
    yield measure("random", 32768, batch=128, queries=1)
