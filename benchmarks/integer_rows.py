"""What the backward of sparse attention takes with rows that are added up as integers.

    python -m benchmarks.integer_rows --keys 8192 --added 2

Rows of none, of one or of both of every two tiles; random selections, shapes and FLOPs of
`benchmarks.sparse_attention_grad`. Prints a line of JSON. With `--lock FILE` several of these can
be compiled side by side on a GPU and timed one after the other.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import jax

from benchmarks import timing
from benchmarks.sparse_attention_grad import FLOP, SCALE, arguments
from pallas_kernels.sparse_attention import backward_sm90


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--added", type=int, default=1, help="of every two tiles: 0, 1 or 2")
    parser.add_argument("--kind", default="random", help="of selections: random or recent")
    parser.add_argument("--lock", type=Path)
    args = parser.parse_args()
    fn = functools.partial(backward_sm90.backward, scale=SCALE, added=args.added)
    given = jax.block_until_ready(arguments(args.kind, args.keys))
    compiled = jax.jit(fn).lower(*given).compile()
    timing.wait_for(args.lock)
    found = jax.block_until_ready(compiled(*given))
    equal = timing.equal_runs(lambda: compiled(*given), found, runs=20)
    time = timing.device_time(compiled, *given, repeats=6)
    kernels = {
        name.removeprefix("sparse_attention_").removesuffix("_mosaic_gpu_kernel"): round(ms, 3)
        for name, ms in time.kernels.items()
        if "mosaic" in name
    }
    row = {
        "keys": args.keys,
        "kind": args.kind,
        "added_of_two": args.added,
        "ms": round(time.median_ms, 3),
        "tflops": round(time.tflops(FLOP), 1),
        "equal_runs": equal,
        "kernels_ms": kernels,
        "xla_ms": round(sum(ms for name, ms in time.kernels.items() if "mosaic" not in name), 3),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
