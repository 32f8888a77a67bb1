"""The forward of sparse attention on a GPU: checked against fp32, then timed.

    python -m benchmarks.ops sparse_attention --json FILE
    python -m benchmarks.ops sparse_attention_decode --keys 32768 --json FILE

FLOPs are counted as 2 T N K (C + R + C), what a dense product over the selected keys takes. Times
are of the kernel and of the two reductions over the indices before it.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from pallas_kernels.sparse_attention import forward_sm90, reference

T, N, K, C, R = 4096, 128, 2048, 512, 64
KEYS = (8192, 32768, 131072)
SCALE = (128 + 64) ** -0.5
BLOCK = 64  # queries that draw from the same pool

attend = jax.jit(functools.partial(forward_sm90.forward, value_width=C, scale=SCALE))

# For references: without Triton's candidates for each product, which take long to compile.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_gpu_enable_triton_gemm": False})


def random_selections(rng: np.random.Generator, queries: int, keys: int, selected: int):
    """Ascending indices `[1, queries, selected]`: a uniform choice, nothing shared by neighbours.

    Queries 256 apart have the same choice, shifted by a random distance around the keys.
    """
    fresh = min(queries, 256)
    draw = functools.partial(rng.choice, keys, selected, replace=False, shuffle=False)
    rows = np.stack([draw() for _ in range(fresh)]).astype(np.int32)
    shift = rng.integers(keys, size=(queries, 1), dtype=np.int32)
    rows = np.resize(rows, (queries, selected)) + shift
    return np.sort(rows % np.int32(keys), axis=1)[None]


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
        order = rng.random((len(own), len(pool)), np.float32).argpartition(rest, axis=1)
        own[:, sinks + latest :] = pool[order[:, :rest]]
    return np.sort(rows, axis=1)[None]


SELECTIONS = {"random": random_selections, "recent": recent_selections}
DOCUMENT = 1024  # tokens of each, where documents are packed
TRAINING_KINDS = ("full", "causal", "packed")


def training_selections(kind: str, length: int) -> np.ndarray:
    """Ascending indices `[1, length, K]`, then -1; queries are the tokens that keys are of.

    Of a `causal` sequence a random choice of the keys up to the query, or all where there are no
    more than K; of a `packed` one the same within its document; `full` rows are as if all keys
    could be seen.
    """
    rng = np.random.default_rng(0)
    if kind == "full":
        return random_selections(rng, length, length, K)
    rows = np.full((1, length, K), -1, np.int32)
    for t in range(length):
        start = t // DOCUMENT * DOCUMENT if kind == "packed" else 0
        visible = t + 1 - start
        some = np.arange(visible) if visible <= K else np.sort(rng.choice(visible, K, False))
        rows[0, t, : len(some)] = start + some
    return rows


@functools.partial(jax.jit, static_argnames="shape")
def normal(seed, shape: tuple[int, ...]):
    """bf16, standard normal; made where it is needed, as a host takes seconds for it."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def inputs(rng: np.random.Generator, batch: int, queries: int, heads: int, keys: int):
    """bf16 q and kv, standard normal."""
    seeds = rng.integers(2**31, size=2)
    return normal(seeds[0], (batch, queries, heads, C + R)), normal(seeds[1], (batch, keys, C + R))


def ragged(rng: np.random.Generator, rows: np.ndarray, keys: int) -> jax.Array:
    """Selections `[1, queries, selected]` cut to 0 to all keys; one index outside the keys."""
    _, queries, selected = rows.shape
    count = rng.integers(0, selected + 1, queries)
    count[:4] = [0, 1, 64, selected]
    rows = np.where(np.arange(selected) < count[:, None], rows, -1)
    rows[0, 5, 7] = keys
    return jnp.asarray(rows)


@quick_jit
def expected(q, kv, rows):
    """out and lse in fp32, of the same bf16 inputs."""
    wide = q.astype(jnp.float32), kv.astype(jnp.float32)
    return reference.forward(*wide, rows, value_width=C, scale=SCALE, workspace_bytes=2**31)


@quick_jit
def errors(found, expected) -> dict[str, jax.Array]:
    """Of out and lse."""
    (out, lse), (wide, wide_lse) = found, expected
    out = out.astype(jnp.float32)
    finite = jnp.isfinite(wide_lse)
    dot = 2 * jnp.sum(out * wide)
    return {
        "abs": jnp.max(jnp.abs(out - wide)),
        "relative": jnp.linalg.norm(out - wide) / jnp.linalg.norm(wide),
        "1-cosine": 1 - dot / (jnp.sum(out**2) + jnp.sum(wide**2)),
        "lse": jnp.max(jnp.where(finite, jnp.abs(lse - wide_lse), 0.0)),
        "empty_differ": jnp.sum(jnp.isfinite(lse) != finite),
    }


def equal_runs(run, found, repeats: int = 20) -> int:
    """How many more runs give the same bits."""
    same = jax.jit(lambda a, b: jnp.all(jnp.array([*map(jnp.array_equal, a, b)])))
    return sum(bool(same(run(), found)) for _ in range(repeats))


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all calls, which compile kernels at the same time.

    Building and compiling them, a shape after another, is what these benchmarks spend most of
    their time on; the compiler at least can work on all shapes at once.
    """
    with concurrent.futures.ThreadPoolExecutor(max(1, len(calls))) as pool:
        jobs = [pool.submit(call) for call in calls]
        return [job.result() for job in jobs]


def arguments(kind: str, keys: int, batch: int = 1, queries: int = T):
    """q, kv and selections of a kind; always the same."""
    rng = np.random.default_rng(0)
    q, kv = inputs(rng, batch, queries, N, keys)
    rows = SELECTIONS[kind](rng, batch * queries, keys, K).reshape(batch, queries, K)
    return q, kv, jnp.asarray(rows)


def check(keys: int, checked: int = 64) -> dict:
    """Errors of queries with 0 to 2048 keys, some of them outside; equal bits of 20 runs.

    They are the first of as many queries as are timed: which takes the same compiled kernel.
    """
    rng = np.random.default_rng()
    q, kv = inputs(rng, 1, T, N, keys)
    rows = random_selections(rng, T, keys, K)
    some = ragged(rng, rows[:, :checked], keys)
    rows = jnp.asarray(rows).at[:, :checked].set(some)
    run = functools.partial(attend, q, kv, rows)
    found = run()
    of_each = errors([x[:, :checked] for x in found], expected(q[:, :checked], kv, some))
    return {name: x.item() for name, x in of_each.items()} | {"equal_runs": equal_runs(run, found)}


def measure(kind: str, keys: int, batch: int = 1, queries: int = T) -> dict:
    """Time and rate of one shape."""
    time = timing.device_time(attend, *arguments(kind, keys, batch, queries), repeats=10)
    return {
        "op": "sparse_attention",
        "kind": kind,
        "batch": batch,
        "queries": queries,
        "keys": keys,
        "topk": K,
        "ms": round(time.median_ms, 4),
        "spread_ms": [round(time.min_ms, 4), round(time.max_ms, 4)],
        "tflops": round(time.tflops(2 * batch * queries * N * K * (2 * C + R)), 1),
    }


def forward(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """Every kind of selection at each number of keys."""

    def prepare(width):
        if width in check_at:
            return check(width)
        jax.block_until_ready(attend(*arguments("random", width)))
        return {}

    errors = in_threads([functools.partial(prepare, width) for width in keys])
    for width, of_width in zip(keys, errors, strict=True):
        for kind in SELECTIONS:
            yield measure(kind, width) | of_width


def decode(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """The forward kernel with one query of each of 64 and 128 rows of a batch."""
    del check_at  # `forward` checks the kernel
    shapes = [(width, batch, 1) for width in keys for batch in (64, 128)]
    in_threads(
        [lambda s=s: jax.block_until_ready(attend(*arguments("random", *s))) for s in shapes]
    )
    for shape in shapes:
        yield measure("random", *shape) | {"op": "sparse_attention_decode"}
