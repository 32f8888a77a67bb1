"""What a token's attention costs by its position, dense and sparse, from times of the kernels.

    python -m benchmarks.positions --modes prefill --json benchmarks/results/positions_h100.json
    python -m benchmarks.positions --modes decode --json benchmarks/results/positions_h100.json
    python -m benchmarks.position_figure FIGURE.png benchmarks/results/positions_h100.json

One attention layer of DeepSeek-V3.2-Exp in bf16, its indexer in e4m3. *Prefill*: the last 4096
queries of a prompt of t tokens; dense attention per head, as prompts are served. *Decode*: one
query each of 64 sequences with t cached keys; dense attention on the latents, by the kernel of
sparse attention given every key (there is no other for it here). DSA is the indexer's selection and
sparse attention in both. Projections are left out of all: they cost the same wherever the token
stands.

Both kinds of sparse call read a cache with room for 128K keys, of which t are filled: what they
cost is what their keys cost, and one program serves all positions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.ops import Results
from benchmarks.timing import device_time, environment
from pallas_kernels import (
    KeyRange,
    Selection,
    dense_attention,
    lightning_indexer,
    sparse_attention,
)
from train.cost import LayerShape

SHAPE = LayerShape()
QUERIES, SEQUENCES = 4096, 64
POSITIONS = (8192, 32_768, 65_536, 131_072)
MODES = ("prefill", "decode")
PARTS = ("dense", "indexer", "sparse")


class Call(NamedTuple):
    """Something to time.

    Attributes:
        mode: `prefill` or `decode`.
        part: `dense`, `indexer` or `sparse`.
        position: t, keys.
        tokens: queries in the call, among which its time is divided.
        make: makes the arguments, on the device.
        run: what is timed.
    """

    mode: str
    part: str
    position: int
    tokens: int
    make: Callable[[], tuple]
    run: Callable[..., Any]


def calls(mode: str, t: int, room: int) -> Iterator[Call]:
    """Everything at one position.

    Args:
        mode: `prefill` or `decode`.
        t: the position.
        room: of the cache, keys.
    """
    batch, queries = (1, QUERIES) if mode == "prefill" else (SEQUENCES, 1)
    for part, (make, run) in _parts(mode, t, room, batch, queries).items():
        yield Call(mode, part, t, batch * queries, make, run)


def _parts(
    mode: str, t: int, room: int, batch: int, queries: int
) -> dict[str, tuple[Callable, Callable]]:
    N, row = SHAPE.heads, SHAPE.latent + SHAPE.rotary
    width = SHAPE.nope + SHAPE.rotary
    ranges = KeyRange.causal(batch, queries, offset=t - queries)

    def numbers(number: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(jax.random.key(number, impl="rbg"), shape, dtype)

    def absorbed() -> tuple:
        return numbers(0, batch, queries, N, row), numbers(1, batch, room, row)

    def selected() -> tuple:
        K = SHAPE.topk
        part = (t - queries + 1) // K  # a key from each of K equal parts: ascending, no two equal
        places = jax.random.randint(jax.random.key(2, impl="rbg"), (batch, queries, K), 0, part)
        return *absorbed(), Selection(part * jnp.arange(K, dtype=jnp.int32) + places)

    def every_key() -> tuple:
        keys = jnp.arange(room, dtype=jnp.int32)
        indices = jnp.where(keys < t, keys, -1)
        return *absorbed(), Selection(jnp.broadcast_to(indices, (batch, queries, room)))

    def indexer() -> tuple:
        I, H = SHAPE.indexer_heads, SHAPE.indexer_width
        q, k = (numbers(3, batch, queries, I, H), numbers(4, batch, t, H))
        scale = jax.random.uniform(jax.random.key(9, impl="rbg"), (batch, t), minval=0.5)
        e4m3 = jnp.float8_e4m3fn
        w = numbers(5, batch, queries, I, dtype=jnp.float32)
        return q.astype(e4m3), k.astype(e4m3), w, scale

    def expanded() -> tuple:
        q, k = numbers(6, batch, queries, N, width), numbers(7, batch, t, N, width)
        return q, k, numbers(8, batch, t, N, SHAPE.value)

    def choose(q, k, w, scale):
        return lightning_indexer(q, k, w, ranges, topk=SHAPE.topk, k_scale=scale)

    def prefill(q, k, v):
        return dense_attention(q, k, v, ranges, scale=width**-0.5)

    dense = (expanded, prefill) if mode == "prefill" else (every_key, attend)
    return {"dense": dense, "indexer": (indexer, choose), "sparse": (selected, attend)}


# Jitted here, so that calls of equal shapes share a program: lowering the kernel takes ten seconds.
@jax.jit
def attend(q, kv, selection):
    """Attention over selected keys of the layer."""
    scale = (SHAPE.nope + SHAPE.rotary) ** -0.5
    return sparse_attention(q, kv, selection, value_width=SHAPE.latent, scale=scale)


def flop(call: Call) -> float:
    """Operations of a call on its visible or selected keys, counted as if all stood at t."""
    per_key = {
        "indexer": SHAPE.indexer_flop,
        "sparse": SHAPE.mqa_flop,
        "dense": SHAPE.mha_flop if call.mode == "prefill" else SHAPE.mqa_flop,
    }[call.part]
    keys = min(call.position, SHAPE.topk) if call.part == "sparse" else call.position
    if call.mode == "prefill" and call.part != "sparse":
        keys -= (QUERIES - 1) / 2  # the mean of the queries
    return per_key * keys * call.tokens


def row(call: Call, ms: float, kernels: dict[str, float]) -> dict[str, Any]:
    """A figure as a row of the results."""
    return {
        "op": "position",
        "kind": f"{call.mode} {call.part}",
        "keys": call.position,
        "rows": call.tokens,
        "ms": round(ms, 4),
        "us_per_token": round(1e3 * ms / call.tokens, 5),
        "tflops": round(flop(call) / ms / 1e9, 1),
        "kernels": {name[:48]: round(x, 4) for name, x in kernels.items() if x > 0.01 * ms},
    }


def measure(
    mode: str, positions: Sequence[int], parts: Sequence[str] = PARTS
) -> Iterator[dict[str, Any]]:
    """Rows of one mode."""
    for t in sorted(positions, reverse=True):
        for call in calls(mode, t, max(positions)):
            if call.part not in parts:
                continue
            arguments = jax.jit(call.make)()
            timing = device_time(call.run, *arguments, repeats=5)
            yield row(call, timing.median_ms, timing.kernels)


def main() -> None:
    """Times everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--keys", type=int, nargs="*", default=POSITIONS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    results = Results(options.json)
    results.runs.append({"environment": environment()})
    for mode in options.modes:
        for found in measure(mode, options.keys, options.parts):
            results.add(found)
            print(json.dumps(results.rows[-1]), flush=True)


if __name__ == "__main__":
    main()
