"""What a token costs by its position: dense MLA grows with it, DSA hardly does.

`LayerShape` counts one attention layer's work on the token at position t, everything that does not
depend on t left out: operations and bytes read, for the three ways DeepSeek-V3.2-Exp attends.
Dense MLA in MQA mode (decode) works on t keys of width C + R; in MHA mode (prefill) on t keys of
width P + R per head, far fewer operations but no shared key; DSA scores all t keys with the small
indexer and attends to min(t, k) of them in MQA mode. `measure` times the same work on this machine.

Letters: N attention heads, C latent width, R rotary width, P nope width, V value width, I indexer
heads, H indexer head width, K selected keys.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import KeyRange, Selection, lightning_indexer, sparse_attention


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Dimensions of one attention layer; the defaults are DeepSeek-V3.2-Exp's.

    Attributes:
        heads: N.
        latent: C.
        rotary: R.
        nope: P.
        value: V.
        indexer_heads: I.
        indexer_width: H.
        topk: keys that DSA attends to.
        bytes_per_number: of the cached latent, rotary and indexer keys (bf16: 2).
    """

    heads: int = 128
    latent: int = 512
    rotary: int = 64
    nope: int = 128
    value: int = 128
    indexer_heads: int = 64
    indexer_width: int = 128
    topk: int = 2048
    bytes_per_number: int = 2

    @property
    def mqa_flop(self) -> int:
        """Per key, MQA mode: a dot product of width C + R and a weighted sum of width C."""
        return 2 * self.heads * (2 * self.latent + self.rotary)

    @property
    def mha_flop(self) -> int:
        """Per key, MHA mode: a dot product of width P + R and a weighted sum of width V."""
        return 2 * self.heads * (self.nope + self.rotary + self.value)

    @property
    def indexer_flop(self) -> int:
        """Per key: I dot products of width H."""
        return 2 * self.indexer_heads * self.indexer_width

    def dense_decode_flop(self, t: float) -> float:
        """Operations of dense attention for one decoded token at position t."""
        return self.mqa_flop * t

    def dense_prefill_flop(self, t: float) -> float:
        """Operations of dense attention for the token at position t of a prompt."""
        return self.mha_flop * t

    def sparse_flop(self, t: float) -> float:
        """Operations of DSA, the same in prefill and decode."""
        return self.indexer_flop * t + self.mqa_flop * min(t, self.topk)

    def masked_prefill_flop(self, t: float) -> float:
        """Operations of DSA simulated by a mask in MHA mode: what short prompts are served with."""
        return self.indexer_flop * t + self.mha_flop * t

    def dense_bytes(self, t: float) -> float:
        """Cache bytes that dense decoding reads: latent and rotary key of t tokens."""
        return self.bytes_per_number * (self.latent + self.rotary) * t

    def sparse_bytes(self, t: float) -> float:
        """Cache bytes that DSA reads: indexer keys of t tokens, latents of the selected ones."""
        row = self.latent + self.rotary
        return self.bytes_per_number * (self.indexer_width * t + row * min(t, self.topk))

    def crossovers(self) -> dict[str, float]:
        """Positions from which on DSA is the cheaper one.

        Beyond k, DSA costs `a t + b k` against `c t` of the dense layer: equal at `b k / (c - a)`.
        `masked prefill` is where DSA by gathering undercuts DSA by masking, the knee of prefill.
        """
        a, b = self.indexer_flop, self.mqa_flop
        row = self.latent + self.rotary
        return {
            "decode operations": b * self.topk / (b - a),
            "decode bytes": row * self.topk / (row - self.indexer_width),
            "prefill operations": b * self.topk / (self.mha_flop - a),
            "masked prefill": b * self.topk / self.mha_flop,
        }


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Median seconds per token at one position, on this machine.

    Attributes:
        position: cached keys before and at the token.
        dense: dense MQA attention over all of them.
        indexer: scoring them and choosing k.
        sparse: attention over the chosen.
    """

    position: int
    dense: float
    indexer: float
    sparse: float

    @property
    def dsa(self) -> float:
        """Indexer and sparse attention together."""
        return self.indexer + self.sparse


def measure(
    shape: LayerShape,
    positions: Sequence[int],
    *,
    tokens: int = 8,
    repeats: int = 5,
    dtype: str = "float32",
    report: Callable[[int], None] = lambda position: None,
) -> list[Measurement]:
    """Times one layer's attention of `tokens` sequences that decode one token each.

    Random numbers, forward only, one compiled program per position: no padding to the longest.

    Args:
        shape: dimensions; take few heads on a CPU.
        positions: cached keys.
        tokens: sequences in the batch, each with a cache of its own.
        repeats: timings of which the median counts, after one that warms up.
        dtype: of queries and keys; with bfloat16 a Hopper GPU's kernels serve DSA.
        report: called with each position once it is measured.
    """
    out = []
    for position in positions:
        out.append(_measure_one(shape, position, tokens, repeats, jnp.dtype(dtype)))
        report(position)
    return out


def _measure_one(
    shape: LayerShape, position: int, tokens: int, repeats: int, dtype: jnp.dtype
) -> Measurement:
    # Drawn once and repeated, which is faster; of a prime length, so that no two keys are equal.
    numbers = np.random.default_rng(position).standard_normal(1_000_003, np.float32)
    row = shape.latent + shape.rotary

    def normal(*dims: int, dtype: jnp.dtype = dtype) -> jax.Array:
        return _repeated(numbers, dims, dtype)

    q, kv = normal(tokens, 1, shape.heads, row), normal(tokens, position, row)
    index_q = normal(tokens, 1, shape.indexer_heads, shape.indexer_width)
    index_k = normal(tokens, position, shape.indexer_width)
    index_w = normal(tokens, 1, shape.indexer_heads, dtype=jnp.dtype(jnp.float32))
    latest = position - 1
    choose = functools.partial(_choose, topk=shape.topk)
    selection = choose(index_q, index_k, index_w, latest)
    dense = functools.partial(_dense, latent=shape.latent)
    attend = functools.partial(_attend, latent=shape.latent)
    return Measurement(
        position,
        dense=_seconds(dense, q, kv, repeats=repeats) / tokens,
        indexer=_seconds(choose, index_q, index_k, index_w, latest, repeats=repeats) / tokens,
        sparse=_seconds(attend, q, kv, selection, repeats=repeats) / tokens,
    )


# Jitted here, so that a second call of `measure` compiles nothing.


@functools.partial(jax.jit, static_argnames=("dims", "dtype"))
def _repeated(numbers: jax.Array, dims: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    size = math.prod(dims)
    rows = jnp.broadcast_to(numbers.astype(dtype), (-(-size // len(numbers)), len(numbers)))
    return rows.reshape(-1)[:size].reshape(dims)


@functools.partial(jax.jit, static_argnames="latent")
def _dense(q: jax.Array, kv: jax.Array, *, latent: int) -> jax.Array:
    logits = jnp.einsum("btnc,bsc->btns", q, kv, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(q.shape[-1] ** -0.5 * logits).astype(q.dtype)
    return jnp.einsum("btns,bsc->btnc", weights, kv[..., :latent])


@functools.partial(jax.jit, static_argnames="topk")
def _choose(q: jax.Array, k: jax.Array, w: jax.Array, latest: int, *, topk: int) -> Selection:
    ranges = KeyRange.causal(*q.shape[:2], offset=latest)
    return lightning_indexer(q, k, w, ranges, topk=topk)


@functools.partial(jax.jit, static_argnames="latent")
def _attend(q: jax.Array, kv: jax.Array, selection: Selection, *, latent: int) -> jax.Array:
    scale = q.shape[-1] ** -0.5
    return sparse_attention(q, kv, selection, value_width=latent, scale=scale)[0]


def _seconds(function: Callable, *arguments, repeats: int) -> float:
    """Median time of a call, after one that compiles it."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)
