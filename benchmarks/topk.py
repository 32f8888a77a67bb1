"""Times and checks of the top-k kernel: `python -m benchmarks.topk --help`."""

from __future__ import annotations

import argparse
import json
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import device_time, environment
from pallas_kernels.lightning_indexer import topk_sm90
from tests.pallas_kernels.topk_rows import best, hard_ranges, hard_rows


def selector(topk: int, sizes: dict):
    return jax.jit(lambda *args: topk_sm90.select_rows(*args, topk=topk, **sizes))


def check(width: int, topk: int, sizes: dict, repeats: int = 20) -> dict:
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
    return {"wrong": wrong}


def measure(width: int, topk: int, sizes: dict, rows: int, kind: str, repeats: int = 7) -> dict:
    """Time on random scores; every column is visible, or half of them causally."""
    scores = jax.random.normal(jax.random.key(0), (rows, width), jnp.float32)
    starts, ends = jnp.zeros(rows, jnp.int32), jnp.full(rows, width, jnp.int32)
    if kind == "causal":
        ends = (jnp.arange(1, rows + 1) * (width / rows)).astype(jnp.int32)
    elif kind == "ascending":
        scores = jnp.sort(scores, axis=1)
    elif kind == "relu":
        scores = jax.nn.relu(scores - 1.5)
    timing = device_time(selector(topk, sizes), scores, starts, ends, repeats=repeats)
    gigabytes = 4e-9 * rows * (width + topk)
    return {
        "ms": round(timing.median_ms, 4),
        "min": round(timing.min_ms, 4),
        "TB/s": round(gigabytes / timing.median_ms, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--widths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--rows", type=int, nargs="*", default=[4096])
    parser.add_argument(
        "--variants", nargs="*", default=[""], help="threads,vectors,capacity,parts"
    )
    parser.add_argument("--check", action="store_true")
    kinds = ["normal", "causal", "ascending", "relu"]
    parser.add_argument("--kind", default="normal", choices=kinds)
    args = parser.parse_args()
    print(json.dumps(environment()))
    names = "threads", "vectors", "capacity", "parts"
    for width in args.widths:
        for variant in args.variants:
            sizes = dict(zip(names, map(int, variant.split(",")), strict=False)) if variant else {}
            record = {"width": width, "kind": args.kind, "variant": variant}
            try:
                if args.check:
                    record |= check(width, args.topk, sizes)
                for rows in args.rows:
                    print(
                        json.dumps(
                            record
                            | {"rows": rows}
                            | measure(width, args.topk, sizes, rows, args.kind)
                        ),
                        flush=True,
                    )
            except Exception:
                print(json.dumps(record), traceback.format_exc(limit=-2)[-900:], flush=True)


if __name__ == "__main__":
    main()
