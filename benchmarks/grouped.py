"""Times the experts' matmul and its gradients: `python -m benchmarks.ops grouped_matmul`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import device_time
from pallas_kernels.grouped_matmul import rows_sm90, weights_sm90

ROWS = 131072
GROUPS = (8, 32, 256)
SHAPES = ((7168, 4096), (2048, 7168))
CTAS = 132


def uneven(groups: int, rows: int, seed: int = 0) -> np.ndarray:
    """Sizes that sum to `rows`: uneven as a router leaves them, every eighth group empty."""
    share = np.random.default_rng(seed).gamma(4.0, size=groups)
    share[7::8] = 0
    ends = np.round(np.cumsum(share) / share.sum() * rows).astype(np.int64)
    return np.diff(ends, prepend=0).astype(np.int32)


def _matrices(groups: int, depth: int, columns: int):
    few = jax.random.normal(jax.random.key(1), (8, depth, columns), jnp.bfloat16)
    return few[jnp.arange(groups) * 5 % 8]


def check(groups: int = 9, rows: int = 3001, depth: int = 320, columns: int = 704) -> dict:
    """All three products against fp32, into memory that held NaN, and the bits of 20 runs."""
    sizes = uneven(groups, rows)
    key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key[0], (rows, depth), jnp.bfloat16)
    w = jax.random.normal(key[1], (groups, depth, columns), jnp.bfloat16)
    g = jax.random.normal(key[2], (rows, columns), jnp.bfloat16)
    jnp.full((2**26,), jnp.nan, jnp.float32).block_until_ready().delete()

    @jax.jit
    def run(x, w, g, sizes):
        return (
            rows_sm90.multiply(x, w, sizes, transpose=False, ctas=CTAS),
            rows_sm90.multiply(g, w, sizes, transpose=True, ctas=CTAS),
            weights_sm90.multiply(x, g, sizes, ctas=CTAS),
        )

    found = run(x, w, g, jnp.asarray(sizes))
    group = np.repeat(np.arange(groups), sizes)
    x, w, g = (np.asarray(a, np.float32) for a in (x, w, g))
    want = [np.zeros(a.shape, np.float32) for a in found]
    for e in range(groups):
        mine = group == e
        want[0][mine], want[1][mine] = x[mine] @ w[e], g[mine] @ w[e].T
        want[2][e] = x[mine].T @ g[mine]
    again = [run(*(jnp.asarray(a, jnp.bfloat16) for a in (x, w, g)), sizes) for _ in range(20)]
    return {
        "errors": [_error(a, b) for a, b in zip(found, want, strict=True)],
        "equal_runs": sum(
            all(bool(jnp.array_equal(a, b)) for a, b in zip(run, found, strict=True))
            for run in again
        ),
    }


def _error(found, want) -> float:
    found = np.asarray(found, np.float64)
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def products(keys: Sequence[int], check_at: Sequence[int]) -> Iterator[dict]:
    """The product and each of its two gradients; keys play no part here."""
    errors = check() if check_at else {}
    for shape in SHAPES:
        for groups in GROUPS:
            ms = _times(groups, *shape)
            row = {"groups": groups, "shape": f"{shape[0]} x {shape[1]}", "rows": ROWS}
            work = 2e-9 * ROWS * shape[0] * shape[1]
            for name, value in ms.items():
                op = f"grouped_matmul {name}"
                yield {"op": op, **row, "ms": round(value, 3), "tflops": work / value, **errors}
            whole = sum(ms.values())
            op = "grouped_matmul with gradients"
            yield {"op": op, **row, "ms": round(whole, 3), "tflops": 3 * work / whole}


def _times(groups: int, depth: int, columns: int) -> dict[str, float]:
    sizes = jnp.asarray(uneven(groups, ROWS))
    x = jax.random.normal(jax.random.key(2), (ROWS, depth), jnp.bfloat16)
    g = jax.random.normal(jax.random.key(3), (ROWS, columns), jnp.bfloat16)
    w = _matrices(groups, depth, columns)
    rows = functools.partial(rows_sm90.multiply, ctas=CTAS)
    weights = functools.partial(weights_sm90.multiply, ctas=CTAS)
    ms = {
        "forward": device_time(
            functools.partial(rows, transpose=False), x, w, sizes, repeats=3
        ).median_ms,
        "dx": device_time(
            functools.partial(rows, transpose=True), g, w, sizes, repeats=3
        ).median_ms,
    }
    del w
    ms["dw"] = device_time(weights, x, g, sizes, repeats=3).median_ms
    return ms
