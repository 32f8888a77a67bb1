"""What a token's attention costs by its position, dense and sparse, from times of the kernels.

    python -m benchmarks.positions --json benchmarks/results/positions_h100.json
    python -m benchmarks.position_figure FIGURE.png benchmarks/results/positions_h100.json

One attention layer of DeepSeek-V3.2-Exp in bf16. *Prefill*: the last 4096 queries of a prompt of t
tokens; dense attention per head, as prompts are served. *Decode*: one query each of 16 sequences
with t cached keys; dense attention on the latents, by XLA (there is no kernel for it here). DSA is
the indexer's selection and sparse attention in both. Projections are left out of all: they cost
the same wherever the token stands.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
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
QUERIES, SEQUENCES = 4096, 16
POSITIONS = (8192, 32_768, 65_536, 131_072)


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


def calls(t: int) -> Iterator[Call]:
    """Everything at one position."""
    for mode, batch, queries in (("prefill", 1, QUERIES), ("decode", SEQUENCES, 1)):
        for part, (make, run) in _parts(mode, t, batch, queries).items():
            yield Call(mode, part, t, batch * queries, make, run)


def _parts(mode: str, t: int, batch: int, queries: int) -> dict[str, tuple[Callable, Callable]]:
    N, row, C = SHAPE.heads, SHAPE.latent + SHAPE.rotary, SHAPE.latent
    width = SHAPE.nope + SHAPE.rotary
    ranges = KeyRange.causal(batch, queries, offset=t - queries)
    scale = width**-0.5

    def numbers(number: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(jax.random.key(number, impl="rbg"), shape, dtype)

    def absorbed() -> tuple:
        return numbers(0, batch, queries, N, row), numbers(1, batch, t, row)

    def selected() -> tuple:
        K = SHAPE.topk
        places = jax.random.uniform(jax.random.key(2, impl="rbg"), (batch, queries, K))
        width = (t - queries + 1) / K  # a key from each of K equal parts: ascending, no two equal
        indices = jnp.floor((jnp.arange(K) + places) * width).astype(jnp.int32)
        return *absorbed(), Selection(jnp.minimum(indices, t - queries))

    def indexer() -> tuple:
        I, H = SHAPE.indexer_heads, SHAPE.indexer_width
        w = numbers(5, batch, queries, I, dtype=jnp.float32)
        return numbers(3, batch, queries, I, H), numbers(4, batch, t, H), w

    def expanded() -> tuple:
        q, k = numbers(6, batch, queries, N, width), numbers(7, batch, t, N, width)
        return q, k, numbers(8, batch, t, N, SHAPE.value)

    def choose(q, k, w):
        return lightning_indexer(q, k, w, ranges, topk=SHAPE.topk)

    def attend(q, kv, selection):
        return sparse_attention(q, kv, selection, value_width=C, scale=scale)

    def prefill(q, k, v):
        return dense_attention(q, k, v, ranges, scale=scale)

    def decode(q, kv):
        logits = jnp.einsum("btnc,bsc->btns", q, kv, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scale * logits).astype(q.dtype)
        return jnp.einsum("btns,bsc->btnc", weights, kv[..., :C])

    dense = (expanded, prefill) if mode == "prefill" else (absorbed, decode)
    return {"dense": dense, "indexer": (indexer, choose), "sparse": (selected, attend)}


def row(call: Call, ms: float, kernels: dict[str, float]) -> dict[str, Any]:
    """A figure as a row of the results."""
    return {
        "op": "position",
        "kind": f"{call.mode} {call.part}",
        "keys": call.position,
        "rows": call.tokens,
        "ms": round(ms, 4),
        "us_per_token": round(1e3 * ms / call.tokens, 5),
        "kernels": {name[:48]: round(x, 4) for name, x in kernels.items()},
    }


def main() -> None:
    """Times everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="*", default=POSITIONS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    results = Results(options.json)
    results.runs.append({"environment": environment()})
    for t in options.keys:
        for call in calls(t):
            timing = device_time(call.run, *jax.jit(call.make)(), repeats=5)
            results.add(row(call, timing.median_ms, timing.kernels))
            print(json.dumps(results.rows[-1]), flush=True)


if __name__ == "__main__":
    main()
