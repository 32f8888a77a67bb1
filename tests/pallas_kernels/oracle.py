"""The ops in float64 NumPy, one query at a time, written from their equations alone.

Nothing here is shared with the code under test. Gradients are compared with central differences of
these functions, so they do not depend on anybody's backward pass either.
"""

from __future__ import annotations

import math

import numpy as np


def f64(x) -> np.ndarray:
    """An array of any dtype, bf16 and e4m3 included, as float64."""
    return np.asarray(x).astype(np.float64)


def visible(ranges, keys: int) -> dict[tuple[int, int], np.ndarray]:
    """The keys of each query's range that exist."""
    start, end = np.asarray(ranges.start), np.asarray(ranges.end)
    return {
        place: np.array([s for s in range(keys) if start[place] <= s < end[place]], int)
        for place in np.ndindex(*start.shape)
    }


def selected(indices, keys: int) -> dict[tuple[int, int], np.ndarray]:
    """The keys of each query's selection that exist, in the order of the slots."""
    indices = np.asarray(indices)
    return {
        place: np.array([s for s in indices[place] if 0 <= s < keys], int)
        for place in np.ndindex(*indices.shape[:2])
    }


def _scores(q, k, w) -> np.ndarray:
    """Scores of one query `[I, H]` and its keys `[S, H]`."""
    return w @ np.maximum(q @ k.T, 0.0)


def indexer_scores(q, k, w, ranges, k_scale=None) -> np.ndarray:
    """`[B, T, S]`, -inf outside the range."""
    q, k, w = f64(q), f64(k), f64(w)
    k_scale = np.ones(k.shape[:2]) if k_scale is None else f64(k_scale)
    out = np.full((*q.shape[:2], k.shape[1]), -np.inf)
    for (b, t), s in visible(ranges, k.shape[1]).items():
        out[b, t, s] = _scores(q[b, t], k[b, s], w[b, t]) * k_scale[b, s]
    return out


def select_topk(scores, ranges, topk: int) -> np.ndarray:
    """`[B, T, min(topk, S)]` by a plain Python sort of (is NaN, -score, index)."""
    scores = np.asarray(scores)
    batch, queries, keys = scores.shape
    out = np.full((batch, queries, min(topk, keys)), -1, np.int32)
    for (b, t), seen in visible(ranges, keys).items():
        ranked = sorted(
            (math.isnan(x), 0.0 if math.isnan(x) else -x, s)
            for s, x in zip(seen.tolist(), scores[b, t, seen].tolist(), strict=True)
        )
        best = sorted(s for *_, s in ranked[:topk])
        out[b, t, : len(best)] = best
    return out


def _attend(scores: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    """Softmax-weighted mean of values and the log-sum-exp, of one query and head."""
    if scores.size == 0:
        return np.zeros(values.shape[-1]), -np.inf
    top = scores.max()
    weights = np.exp(scores - top)
    return weights @ values / weights.sum(), float(top + np.log(weights.sum()))


def sparse_attention(q, kv, indices, *, value_width: int, scale: float):
    """`(out, lse)`."""
    q, kv = f64(q), f64(kv)
    batch, queries, heads, _ = q.shape
    out, lse = np.zeros((batch, queries, heads, value_width)), np.zeros((batch, queries, heads))
    for (b, t), s in selected(indices, kv.shape[1]).items():
        for n in range(heads):
            scores = scale * (kv[b, s] @ q[b, t, n])
            out[b, t, n], lse[b, t, n] = _attend(scores, kv[b, s, :value_width])
    return out, lse


def dense_attention(q, k, v, ranges, *, scale: float):
    """`(out, lse)`."""
    q, k, v = f64(q), f64(k), f64(v)
    batch, queries, heads, _ = q.shape
    out, lse = np.zeros((batch, queries, heads, v.shape[-1])), np.zeros((batch, queries, heads))
    for (b, t), s in visible(ranges, k.shape[1]).items():
        for n in range(heads):
            scores = scale * (k[b, s, n] @ q[b, t, n])
            out[b, t, n], lse[b, t, n] = _attend(scores, v[b, s, n])
    return out, lse


def _kl(mass: np.ndarray, scores: np.ndarray) -> float:
    """KL(mass / sum(mass) || softmax(scores)) of one query."""
    if scores.size == 0:
        return 0.0
    p = mass / mass.sum()
    log_q = scores - scores.max()
    log_q = log_q - np.log(np.exp(log_q).sum())
    held = p > 0
    return float((p[held] * (np.log(p[held]) - log_q[held])).sum())


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max()) if scores.size else scores
    return weights / weights.sum() if scores.size else scores


def indexer_kl_dense(iq, ik, iw, q, k, ranges, *, scale: float) -> np.ndarray:
    """`[B, T]`; the target from its definition (a softmax for each head), not from lse."""
    iq, ik, iw, q, k = (f64(x) for x in (iq, ik, iw, q, k))
    out = np.zeros(q.shape[:2])
    for (b, t), keys in visible(ranges, k.shape[1]).items():
        mass = sum(_softmax(scale * (k[b, keys, n] @ q[b, t, n])) for n in range(q.shape[2]))
        out[b, t] = _kl(np.asarray(mass), _scores(iq[b, t], ik[b, keys], iw[b, t]))
    return out


def indexer_kl_sparse(iq, ik, iw, q, kv, indices, *, scale: float) -> np.ndarray:
    """`[B, T]`; the target from its definition (a softmax for each head), not from lse."""
    iq, ik, iw, q, kv = (f64(x) for x in (iq, ik, iw, q, kv))
    out = np.zeros(q.shape[:2])
    for (b, t), keys in selected(indices, kv.shape[1]).items():
        mass = sum(_softmax(scale * (kv[b, keys] @ q[b, t, n])) for n in range(q.shape[2]))
        out[b, t] = _kl(np.asarray(mass), _scores(iq[b, t], ik[b, keys], iw[b, t]))
    return out


def assert_gradients(found, fn, *arguments, rtol: float, atol: float, places: int = 24) -> None:
    """Compares gradients with central differences of a scalar function in float64.

    For each argument some entries are moved one by one, and then all of them at once in a random
    direction, so that no entry goes unseen.

    Args:
        found: the gradients under test, one for each argument.
        fn: the function, from the oracle.
        *arguments: where.
        rtol: relative tolerance; for the direction, relative to the gradient's norm.
        atol: absolute tolerance.
        places: how many entries are moved one by one.
    """
    rng = np.random.default_rng(0)
    step = 1e-5  # error about step**2 from the third derivative, 1e-16 / step from rounding
    numbered = [(i, f64(x)) for i, x in enumerate(arguments)]
    for (number, x), g in zip(numbered, found, strict=True):
        g = f64(g)
        assert g.shape == x.shape

        def slope(direction, number=number):
            def moved(by):
                return fn(*(a + by * direction if i == number else a for i, a in numbered))

            return (moved(step) - moved(-step)) / (2 * step)

        for place in rng.permutation(x.size)[:places]:
            one = np.zeros(x.size)
            one[place] = 1.0
            expected = slope(one.reshape(x.shape))
            message = f"argument {number} at {np.unravel_index(place, x.shape)}"
            np.testing.assert_allclose(g.flat[place], expected, rtol, atol, err_msg=message)
        direction = rng.standard_normal(x.shape)
        tolerance = atol + rtol * np.linalg.norm(g)
        message = f"argument {number} in a random direction"
        np.testing.assert_allclose(
            (g * direction).sum(), slope(direction), 0, 4 * tolerance, err_msg=message
        )
