"""Times and checks of the lightning indexer.

python -m benchmarks.ops indexer fused prefill indexer_decode --json FILE
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Timing, device_time
from pallas_kernels import KeyRange
from pallas_kernels.lightning_indexer import reference, scores_sm90, selection_sm90
from pallas_kernels.tiling import WORKSPACE_BYTES
from tests.pallas_kernels.selection_margin import MARGIN, differences

TOPK = 2048
HEADS, WIDTH = 64, 128
QUERIES = 4096


def inputs(queries: int, keys: int, seed: int = 0, batch: int = 1):
    """Random queries, keys, weights of both signs, causal ranges and key scales."""
    key = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(key[0], (batch, queries, HEADS, WIDTH)).astype(jnp.float8_e4m3fn)
    k = jax.random.normal(key[1], (batch, keys, WIDTH)).astype(jnp.float8_e4m3fn)
    w = jax.random.normal(key[2], (batch, queries, HEADS)) / HEADS
    scale = jax.random.uniform(key[3], (batch, keys), minval=0.5, maxval=2.0)
    return q, k, w, KeyRange.causal(batch, queries, offset=keys - queries), scale


def flop(ranges: KeyRange) -> float:
    """Of the matrix product over visible pairs."""
    pairs = np.maximum(np.asarray(ranges.end, np.int64) - np.asarray(ranges.start), 0).sum()
    return 2.0 * HEADS * WIDTH * float(pairs)


def exact_scores(pick, q, k, w, ranges, k_scale):
    """Scores of some queries in fp32, from the same e4m3 inputs.

    The inputs are cast outside of the compiled product: inside it XLA would see e4m3 operands and
    multiply on the tensor cores, with their rounding.
    """
    wide = q[:, pick].astype(jnp.float32), k.astype(jnp.float32)
    some = KeyRange(ranges.start[:, pick], ranges.end[:, pick])
    return reference.indexer_scores(*wide, w[:, pick], some, k_scale, workspace_bytes=2**31)


def sampled_queries(queries: int, rows: int = 64) -> np.ndarray:
    """Some queries to compare, ascending."""
    return np.sort(np.random.default_rng(1).choice(queries, min(rows, queries), replace=False))


def poison(shape) -> None:
    """Leaves NaN in the memory that the next result of this shape is likely to get."""
    jnp.full(shape, jnp.nan, jnp.float32).block_until_ready().delete()


def check_scores(fn, *arguments) -> dict[str, float]:
    """Masks everywhere, values on some rows against fp32, bits over 20 runs."""
    q, k, _, ranges, _ = arguments
    poison((*q.shape[:2], k.shape[1]))
    out = fn(*arguments)

    @jax.jit
    def mask_errors(out):
        seen = ranges.mask(k.shape[1])
        return jnp.sum(jnp.where(seen, ~jnp.isfinite(out), out != -jnp.inf))

    pick = sampled_queries(q.shape[1])
    want, got = np.asarray(exact_scores(pick, *arguments)), np.asarray(out[:, pick])
    seen = np.isfinite(want)
    x, y = got[seen].astype(np.float64), want[seen].astype(np.float64)
    same = jax.jit(lambda a, b: jnp.array_equal(a.view(jnp.int32), b.view(jnp.int32)))
    return {
        "mask_errors": int(mask_errors(out)),
        "calc_diff": float(1 - 2 * (x @ y) / (x @ x + y @ y)),
        "relative_error": float(np.linalg.norm(x - y) / np.linalg.norm(y)),
        "equal_runs": sum(bool(same(out, fn(*arguments))) for _ in range(20)),
    }


def check_selection(select, runs: int, *arguments) -> dict[str, float]:
    """Against the kernel's own scores, exactly; against fp32 scores, up to a margin; and bits."""
    q, k, w, ranges, k_scale = arguments
    queries = q.shape[1]
    found = select(*arguments)
    some = slice(None, None, max(1, queries // 4096))  # of a long prefill not all scores fit
    ranges_of_some = KeyRange(ranges.start[:, some], ranges.end[:, some])
    scores = scores_sm90.indexer_scores(q[:, some], k, w[:, some], ranges_of_some, k_scale)
    want = reference.select_topk(scores, ranges_of_some, topk=TOPK, workspace_bytes=2**31)
    wrong = int(jnp.sum(jnp.any(found[:, some] != want, axis=-1)))
    del scores, want
    batch, pick = q.shape[0], sampled_queries(queries)
    exact = exact_scores(pick, *arguments)
    near = differences(found[:, pick], exact, TOPK, MARGIN["float8_e4m3fn"])
    return {
        "wrong_rows": wrong,
        "rows_compared": batch * len(range(queries)[some]),
        "beyond_margin": near.beyond,
        "changed_keys_a_row": near.changed / (batch * len(pick)),
        "equal_runs": sum(bool(jnp.array_equal(found, select(*arguments))) for _ in range(runs)),
    }


def scores(keys: Sequence[int], check: Sequence[int]) -> Iterator[dict]:
    """The scores kernel: 4096 queries at the end of so many keys."""
    for count in keys:
        arguments = inputs(QUERIES, count)
        row: dict = {"op": "indexer_scores", "queries": QUERIES, "keys": count}
        if count in check:
            row |= check_scores(scores_sm90.indexer_scores, *arguments)
        yield row | figures(device_time(scores_sm90.indexer_scores, *arguments), arguments[3])


def fused(
    keys: Sequence[int],
    check: Sequence[int],
    workspaces: Sequence[int] = (WORKSPACE_BYTES, 2**32),
) -> Iterator[dict]:
    """From q, k, w to the selection: 4096 queries at the end of so many keys."""
    for count in keys:
        arguments = inputs(QUERIES, count)
        for workspace in workspaces:
            first = workspace == workspaces[0]
            if not first and 4 * QUERIES * count <= workspaces[0]:
                continue  # the same windows
            row = {"op": "lightning_indexer", "queries": QUERIES, "keys": count}
            yield row | _selection(arguments, workspace, first and count in check, 20)


def prefill(keys: Sequence[int], check: Sequence[int]) -> Iterator[dict]:
    """A causal prefill in one call: as many queries as keys."""
    for count in keys:
        row = {"op": "prefill", "queries": count, "keys": count}
        yield row | _selection(inputs(count, count), WORKSPACE_BYTES, count in check, 3)


def decode(keys: Sequence[int], check: Sequence[int]) -> Iterator[dict]:
    """The selection of one query for each row of a batch, and how fast its scores read the keys."""
    draw = jax.jit(inputs, static_argnums=(0, 1, 2, 3))
    for count in keys:
        for batch in (64, 16, 1):
            arguments = draw(1, count, 0, batch)
            row: dict = {"op": "indexer_decode", "batch": batch, "queries": 1, "keys": count}
            if batch == 16 and count in check:
                row |= check_scores(scores_sm90.indexer_scores, *arguments)
            row |= _selection(arguments, WORKSPACE_BYTES, batch == 16 and count in check, 20)
            scores_ms = sum(ms for name, ms in row["kernels"].items() if "indexer_scores" in name)
            moved = batch * count * (WIDTH + 4 + 4)  # keys and their scales; scores
            yield row | {"scores_gb_per_s": round(moved / scores_ms / 1e6)}


def _selection(arguments, workspace: int, check: bool, runs: int) -> dict:
    options = dict(topk=TOPK, workspace_bytes=workspace)
    select = functools.partial(selection_sm90.lightning_indexer, **options)
    compiled = selection_sm90.lightning_indexer.lower(*arguments, **options).compile()
    row: dict = {"workspace_bytes": workspace}
    row["temporary_bytes"] = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
    if check:
        row |= check_selection(select, runs, *arguments)
    return row | figures(device_time(select, *arguments, repeats=runs), arguments[3])


def figures(timing: Timing, ranges: KeyRange) -> dict:
    """What a timing says."""
    kernels = {name: round(ms, 4) for name, ms in timing.kernels.items() if ms > 0.001}
    return {
        "ms": round(timing.median_ms, 4),
        "min_ms": round(timing.min_ms, 4),
        "max_ms": round(timing.max_ms, 4),
        "tflops": round(timing.tflops(flop(ranges)), 1),
        "kernels": kernels,
    }
