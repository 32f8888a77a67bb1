"""Times dense attention: `python -m benchmarks.ops dense_attention dense_attention_grad`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import device_time, equal_runs, reference_jit
from pallas_kernels import KeyRange
from pallas_kernels.dense_attention import backward_sm90, forward_sm90, reference


def shapes(keys: int) -> dict[str, tuple[int, int, int, int, int]]:
    """T = S, N, P+R, V and documents of what is timed at a length."""
    found = {"192/128": (keys, 128, 192, 128, 1)}
    if keys == 32768:
        found["192/128, 5 documents"] = (keys, 128, 192, 128, 5)
    if keys == 8192:
        found["256/256"] = (keys, 64, 256, 256, 1)
    return found


@functools.partial(jax.jit, static_argnums=range(5))
def _normal(length: int, heads: int, width: int, value_width: int, seed: int):
    key = jax.random.split(jax.random.key(seed), 3)
    return [
        jax.random.normal(some, (1, length, heads, columns), jnp.bfloat16)
        for some, columns in zip(key, (width, width, value_width), strict=True)
    ]


def inputs(length: int, heads: int, width: int, value_width: int, documents: int, seed: int = 0):
    """Random q, k, v in bf16, and causal ranges of documents of uneven length."""
    q, k, v = _normal(length, heads, width, value_width, seed)
    if documents == 1:
        return q, k, v, KeyRange.causal(1, length)
    cuts = np.random.default_rng(seed).choice(length, documents - 1, replace=False)
    ids = 1 + (np.arange(length)[:, None] >= np.sort(cuts)).sum(1)
    return q, k, v, KeyRange.packed(jnp.asarray(ids)[None])


def flop(ranges: KeyRange, heads: int, widths: int) -> float:
    """Of the products over visible pairs; `widths` is the sum of the contracted widths."""
    pairs = np.maximum(np.asarray(ranges.end, np.int64) - np.asarray(ranges.start), 0).sum()
    return 2.0 * heads * widths * float(pairs)


def _error(found, want) -> float:
    found, want = (np.asarray(x, np.float64) for x in (found, want))
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def check_forward(q, k, v, ranges, scale: float, rows: int = 128, heads: int = 2) -> dict:
    """Some rows of some heads against fp32, and the bits of 20 runs."""
    jnp.full((*q.shape[:3], v.shape[3]), jnp.nan, q.dtype).block_until_ready().delete()
    run = functools.partial(forward_sm90.attend, q, k, v, ranges, scale=scale)
    out, lse = run()
    rng = np.random.default_rng(1)
    pick = np.sort(rng.choice(q.shape[1], min(rows, q.shape[1]), replace=False))
    some = np.sort(rng.choice(q.shape[2], heads, replace=False))

    @reference_jit
    def reference_of(q, k, v, ranges):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return reference.forward(q, k, v, ranges, scale=scale, workspace_bytes=2**31)

    want, want_lse = reference_of(
        q[:, pick][:, :, some], k[:, :, some], v[:, :, some],
        KeyRange(ranges.start[:, pick], ranges.end[:, pick]),
    )  # fmt: skip
    return {
        "relative_error": _error(out[:, pick][:, :, some], want),
        "lse_error": float(jnp.abs(lse[:, pick][:, :, some] - want_lse).max()),
        "finite": bool(jnp.isfinite(out).all()),
        "equal_runs": equal_runs(run, (out, lse)),
    }


def forward(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """The forward kernel, at each length."""
    for length in keys:
        for name, shape in shapes(length).items():
            row = {"op": "dense_attention", "keys": length, "shape": name}
            yield row | _forward(shape, length in check_at)


def _forward(shape: tuple[int, int, int, int, int], check: bool) -> dict:
    q, k, v, ranges = inputs(*shape)
    scale = q.shape[-1] ** -0.5
    row: dict = {}
    if check:
        row |= check_forward(q, k, v, ranges, scale)
    timing = device_time(
        functools.partial(forward_sm90.attend, scale=scale), q, k, v, ranges, repeats=10
    )
    work = flop(ranges, q.shape[2], q.shape[3] + v.shape[3])
    return row | {"ms": timing.median_ms, "tflops": timing.tflops(work), "kernels": timing.kernels}


def check_backward(documents: int = 3, length: int = 1000, heads: int = 2) -> dict:
    """All three gradients against fp32, and the bits of 20 runs."""
    q, k, v, ranges = inputs(length, heads, 192, 128, documents)
    scale = q.shape[-1] ** -0.5
    out, lse = forward_sm90.attend(q, k, v, ranges, scale=scale)
    key = jax.random.split(jax.random.key(3))
    dout = jax.random.normal(key[0], out.shape, out.dtype)
    dlse = jax.random.normal(key[1], lse.shape)
    jnp.full((2**24,), jnp.nan, jnp.float32).block_until_ready().delete()
    run = functools.partial(
        backward_sm90.gradients, q, k, v, ranges, out, lse, dout, dlse, scale=scale
    )
    found = run()

    @reference_jit
    def reference_of(q, k, v, out, dout):
        wide = [x.astype(jnp.float32) for x in (q, k, v, out, dout)]
        return reference.backward(
            *wide[:3], ranges, wide[3], lse, wide[4], dlse, scale=scale, workspace_bytes=2**30
        )

    want = reference_of(q, k, v, out, dout)
    errors = [_error(x, y) for x, y in zip(found, want, strict=True)]
    return {"relative_errors": errors, "equal_runs": equal_runs(run, found)}


def backward(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """The backward kernels, at each length; the five products are counted once."""
    for length in keys:
        for name, shape in shapes(length).items():
            if backward_sm90.serves(*shape[2:4]):
                row = {"op": "dense_attention_grad", "keys": length, "shape": name}
                yield row | _backward(shape, length in check_at)


def _backward(shape: tuple[int, int, int, int, int], check: bool) -> dict:
    q, k, v, ranges = inputs(*shape)
    scale = q.shape[-1] ** -0.5
    row: dict = check_backward(shape[-1]) if check else {}
    out, lse = forward_sm90.attend(q, k, v, ranges, scale=scale)
    timing = device_time(
        functools.partial(backward_sm90.gradients, scale=scale),
        q, k, v, ranges, out, lse, jnp.roll(out, 1, axis=1), jnp.zeros_like(lse), repeats=5,
    )  # fmt: skip
    work = flop(ranges, q.shape[2], 3 * q.shape[3] + 2 * v.shape[3])
    return row | {"ms": timing.median_ms, "tflops": timing.tflops(work), "kernels": timing.kernels}
