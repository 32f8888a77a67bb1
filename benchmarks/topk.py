"""Times and checks of the top-k kernel: `python -m benchmarks.ops topk`.

`python -m benchmarks.topk --variants 256,4,10240 128,4,5120` compares sizes.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import device_time
from pallas_kernels.lightning_indexer import topk_sm90
from pallas_kernels.lightning_indexer.topk_plan import sampled_vector
from tests.pallas_kernels.topk_rows import best, hard_ranges, hard_rows

TOPK = 2048
ROWS = 4096
KINDS = ("random", "misled ascending", "misled", "causal", "relu", "ascending", "descending")


def selector(topk: int, sizes: dict):
    return jax.jit(lambda *args: topk_sm90.select_rows(*args, topk=topk, **sizes))


def check_rows(width: int, topk: int, sizes: dict, repeats: int = 20) -> list:
    """Hard rows against a sort, random rows against `lax.top_k`; equal bits in every run."""
    names, rows = zip(*hard_rows(width), strict=True)
    rows = np.stack(rows)
    select = selector(topk, sizes)
    wrong = []
    whole = np.zeros(len(rows), np.int32), np.full(len(rows), width, np.int32)
    for starts, ends in (whole, hard_ranges(len(rows), width)):
        args = [jnp.asarray(x) for x in (rows, starts, ends)]
        got = np.asarray(select(*args))
        want = best(rows, starts, ends, topk)
        for name, g, w, start, end in zip(names, got, want, starts, ends, strict=True):
            if not np.array_equal(g, w):
                wrong.append((name, int((g != w).sum()), int(start), int(end)))
        if any(not np.array_equal(got, select(*args)) for _ in range(repeats)):
            wrong.append(("not the same in every run",))
    scores = jax.random.normal(jax.random.key(1), (264, width), jnp.float32)
    everything = jnp.zeros(264, jnp.int32), jnp.full(264, width, jnp.int32)
    got = select(scores, *everything)
    want = jnp.sort(jax.lax.top_k(scores, topk)[1], axis=1)
    if not bool((got == want).all()):
        wrong.append(("lax.top_k", int((got != want).sum())))
    return wrong


def mislead(scores, topk: int, sizes: dict):
    """Raises the very scores from which the kernel guesses its threshold, in every row."""
    rows, width = scores.shape
    plan = topk_sm90.plan(topk, width, rows, **sizes)
    slots = np.arange(plan.sample // 4, dtype=np.uint32)
    vectors = sampled_vector(slots, np.uint32(width // 4), plan)
    raised = np.zeros((width // 4, 4), np.float32)
    raised[vectors] = 9
    return scores + raised.ravel()


def scores_of(kind: str, rows: int, width: int, topk: int, sizes: dict):
    """Scores and ranges; every column is visible, or half of them causally."""
    scores = jax.random.normal(jax.random.key(0), (rows, width), jnp.float32)
    starts, ends = jnp.zeros(rows, jnp.int32), jnp.full(rows, width, jnp.int32)
    if kind == "causal":
        ends = (jnp.arange(1, rows + 1) * (width / rows)).astype(jnp.int32)
    if kind == "relu":
        scores = jax.nn.relu(scores - 1.5)
    if "scending" in kind:
        scores = jnp.sort(scores, axis=1, descending="descending" in kind)
    if "misled" in kind:
        scores = mislead(scores, topk, sizes)
    return scores, starts, ends


def measure(kind: str, rows: int, width: int, topk: int = TOPK, **sizes: int) -> dict:
    """The time of one kind of scores."""
    arguments = scores_of(kind, rows, width, topk, sizes)
    timing = device_time(selector(topk, sizes), *arguments, repeats=10)
    row = {"op": "select_topk", "kind": kind, "rows": rows, "keys": width, "topk": topk}
    read = float(jnp.sum(arguments[2] - arguments[1]))
    return row | {
        "ms": round(timing.median_ms, 4),
        "min_ms": round(timing.min_ms, 4),
        "max_ms": round(timing.max_ms, 4),
        "tb_s": round(4e-9 * (read + rows * topk) / timing.median_ms, 3),
    }


def rows(keys: Sequence[int], check: Sequence[int]) -> Iterator[dict]:
    """4096 rows of random scores; where checked also of each other kind, few rows, and other K."""
    for width in keys:
        if width not in check:
            yield measure("random", ROWS, width)
            continue
        for few in (64, 8, 1):
            yield measure("random", few, width)
        for topk in (512, 4096):
            yield measure("random", ROWS, width, topk)
        wrong = check_rows(width, TOPK, {})
        for kind in KINDS:
            yield measure(kind, ROWS, width) | {"wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topk", type=int, default=TOPK)
    parser.add_argument("--widths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--rows", type=int, nargs="*", default=[ROWS])
    names = "threads", "vectors", "capacity", "sample", "ahead", "parts"
    parser.add_argument("--variants", nargs="*", default=[""], help=",".join(names))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--kinds", nargs="*", default=["random"], choices=KINDS)
    args = parser.parse_args()
    for width in args.widths:
        for variant in args.variants:
            sizes = dict(zip(names, map(int, variant.split(",")), strict=False)) if variant else {}
            try:
                wrong = check_rows(width, args.topk, sizes) if args.check else []
                for kind in args.kinds:
                    for rows in args.rows:
                        row = {"variant": variant} | measure(kind, rows, width, args.topk, **sizes)
                        print(
                            json.dumps(row | ({"wrong": wrong} if args.check else {})), flush=True
                        )
            except Exception:
                print(variant, traceback.format_exc(limit=-2)[-900:], flush=True)


if __name__ == "__main__":
    main()
