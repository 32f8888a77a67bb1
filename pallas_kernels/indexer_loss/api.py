"""What the indexer learns from: `indexer_kl_dense` (warm-up) and `indexer_kl_sparse`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import checks
from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.indexer_loss import dense_sm90, reference, sparse_sm90
from pallas_kernels.tiling import WORKSPACE_BYTES, vary_like
from pallas_kernels.types import KeyRange, Selection

# A kernel goes in here, beside the reference; its limits into what `choose` is told.
_DENSE = {
    "xla": (reference.dense_forward, reference.dense_backward),
    "mosaic": (dense_sm90.forward, dense_sm90.backward),
}
_DENSE_AT_ONCE = {"xla": reference.dense_forward_and_backward, "mosaic": dense_sm90.run}
# What keeps for the backward what it needs, and the backward of that.
_SPARSE = {"xla": reference.sparse_forward, "mosaic": sparse_sm90.forward}
_SPARSE_GRADIENT = {
    "xla": (reference.sparse_forward_for_backward, reference.sparse_backward),
    "mosaic": (sparse_sm90.forward_for_backward, sparse_sm90.backward),
}


def indexer_kl_dense(
    iq: Float[Array, "B T I H"],
    ik: Float[Array, "B S H"],
    iw: Float32[Array, "B T I"],
    q: Float[Array, "B T N P+R"],
    k: Float[Array, "B S N P+R"],
    lse: Float32[Array, "B T N"],
    ranges: KeyRange,
    *,
    scale: float,
    implementation: Implementation = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Float32[Array, "B T"]:
    """How far the indexer is from dense attention, per query: the loss of the warm-up stage.

        A[t, n, s] = exp(scale q[t, n] . k[s, n] - lse[t, n])
        p[t, s]    = sum_n A[t, n, s] / sum_{n, s} A[t, n, s]
        score[t, s] = sum_i iw[t, i] relu(iq[t, i] . ik[s])
        kl[t]      = sum_s p[t, s] (log p[t, s] - log softmax_s(score[t])[s])

    (DeepSeek-V3.2-Exp report, equation 3), sums over the key range, in fp32, 0 log 0 = 0. The
    gradient goes to iq, ik and iw only, in closed form: d kl / d score = softmax(score) - p on the
    range. It is bit-equal between runs; memory is O(T + S) beside the workspace.

    Args:
        iq: indexer queries, bf16 or fp32.
        ik: indexer keys; dtype of iq, or fp32 beside iq in bf16: they are rounded to iq's dtype
            first, and their gradient is not, so that it can be added up further.
        iw: head weights of the indexer, of either sign.
        q: queries of `dense_attention`, detached.
        k: keys of `dense_attention`, detached; dtype of q.
        lse: its log-sum-exp over the same ranges and with the same scale, detached.
        ranges: the keys each query may see.
        scale: the softmax scale of `dense_attention`.
        implementation: `"mosaic"`, `"xla"`, or None for the fastest that serves the call.
        workspace_bytes: bound on the temporary memory of the XLA implementation, as long as one
            query, and fp32 copies of ik and of one head of k, fit it.

    Returns:
        The divergence in nats, 0 up to rounding or more; 0 for a query without keys.

    Raises:
        ValueError, TypeError: arguments that contradict each other.
        UnsupportedError: `implementation` cannot serve the call.
    """
    op = "indexer_kl_dense"
    config = _check_dense(op, iq, ik, iw, q, k, lse, ranges, scale, workspace_bytes, implementation)
    arguments = (iq, ik, iw, *jax.lax.stop_gradient((q, k, lse)), ranges)
    return _dense(*vary_like(arguments, arguments), config)


def indexer_kl_dense_loss(
    iq: Float[Array, "B T I H"],
    ik: Float[Array, "B S H"],
    iw: Float32[Array, "B T I"],
    q: Float[Array, "B T N P+R"],
    k: Float[Array, "B S N P+R"],
    lse: Float32[Array, "B T N"],
    ranges: KeyRange,
    row_weights: Float32[Array, "B T"],
    *,
    scale: float,
    implementation: Implementation = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Float32[Array, ""]:
    """`(row_weights * indexer_kl_dense(...)).sum()`, its gradient taken in the same pass.

    The target is what costs most, and the value and the gradient both need it. Where the weight of
    each row is known beforehand, as in a mean, differentiation computes the gradient along with
    the value, building the target once, and keeps it (as large as iq, ik and iw) for the backward
    pass, which only multiplies by the incoming scalar. Undifferentiated, it computes the value
    alone.

    Args:
        iq, ik, iw, q, k, lse, ranges, scale, implementation, workspace_bytes: as in
            `indexer_kl_dense`.
        row_weights: factor of each query's divergence, detached.

    Returns:
        The weighted sum, in nats.

    Raises:
        ValueError, TypeError: arguments that contradict each other.
        UnsupportedError: `implementation` cannot serve the call.
    """
    op = "indexer_kl_dense_loss"
    config = _check_dense(op, iq, ik, iw, q, k, lse, ranges, scale, workspace_bytes, implementation)
    checks.shapes(op, {"iq": (iq, "B T I H"), "row_weights": (row_weights, "B T")})
    checks.dtype(op, (jnp.float32,), row_weights=row_weights)
    arguments = (iq, ik, iw, *jax.lax.stop_gradient((q, k, lse)), ranges)
    arguments = (*arguments, jax.lax.stop_gradient(row_weights))
    return _dense_loss(*vary_like(arguments, arguments), config)


def indexer_kl_sparse(
    iq: Float[Array, "B T I H"],
    ik: Float[Array, "B S H"],
    iw: Float32[Array, "B T I"],
    q: Float[Array, "B T N C+R"],
    kv: Float[Array, "B S C+R"],
    lse: Float32[Array, "B T N"],
    selection: Selection,
    *,
    scale: float,
    implementation: Implementation = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Float32[Array, "B T"]:
    """How far the indexer is from sparse attention, per query: its loss in the sparse stage.

    As `indexer_kl_dense`, over the selected keys only (DeepSeek-V3.2-Exp report, equation 4):

        A[t, n, s] = exp(scale q[t, n] . kv[s] - lse[t, n])         for s in the selection of t
        p[t, s]    = sum_n A[t, n, s] / sum_{n, s} A[t, n, s]
        kl[t]      = sum_s p[t, s] (log p[t, s] - log softmax_{s selected}(score[t])[s])

    A is the softmax over the selection, head by head: lse must be that of `sparse_attention`, not
    of dense attention. The gradient goes to iq, ik and iw only; it is bit-equal between runs but
    for the XLA implementation on a GPU.

    Args:
        iq: indexer queries, bf16 or fp32.
        ik: indexer keys; dtype of iq, or fp32 beside iq in bf16: they are rounded to iq's dtype
            first, and their gradient is not, so that it can be added up further.
        iw: head weights of the indexer, of either sign.
        q: absorbed queries of `sparse_attention`, detached.
        kv: its keys, detached; dtype of q.
        lse: its log-sum-exp over the same selection and with the same scale, detached.
        selection: the keys each query attends to. Entries outside `0..S-1` are ignored.
        scale: the softmax scale of `sparse_attention`.
        implementation: `"mosaic"`, `"xla"`, or None for the fastest that serves the call.
        workspace_bytes: bound on the temporary memory of the XLA implementation, as long as one
            query, and in the backward pass a fp32 copy of ik, fit it.

    Returns:
        The divergence in nats, 0 up to rounding or more; 0 for a query without keys.

    Raises:
        ValueError, TypeError: arguments that contradict each other.
        UnsupportedError: `implementation` cannot serve the call.
    """
    op = "indexer_kl_sparse"
    checks.selection(op, selection)
    arrays = {
        **_indexer_shapes(iq, ik, iw),
        "q": (q, "B T N C+R"),
        "kv": (kv, "B S C+R"),
        "lse": (lse, "B T N"),
        "selection.indices": (selection.indices, "B T K"),
    }
    checks.shapes(op, arrays)
    _check_indexer(op, iq, ik, iw, lse)
    checks.dtype(op, checks.FLOATS, q=q, kv=kv)
    unsupported = sparse_sm90.unsupported(iq, _rounded(ik, iq), q, kv)
    config = _config(op, scale, workspace_bytes, implementation, unsupported, ik)
    arguments = (iq, ik, iw, *jax.lax.stop_gradient((q, kv, lse)), selection.indices)
    return _sparse(*vary_like(arguments, arguments), config)


class _Config(NamedTuple):
    scale: float
    workspace_bytes: int
    implementation: str
    dik_dtype: jnp.dtype


def _rounded(ik, iq):
    """Keys as they enter products: an argument in fp32 is there for its gradient."""
    return ik.astype(iq.dtype)


def _config(op, scale, workspace_bytes, implementation, unsupported, ik) -> _Config:
    return _Config(
        scale=checks.scale(op, scale),
        workspace_bytes=checks.positive_int(op, "workspace_bytes", workspace_bytes),
        implementation=choose(op, implementation, unsupported),
        dik_dtype=jnp.dtype(ik.dtype),
    )


def _check_dense(op, iq, ik, iw, q, k, lse, ranges, scale, workspace_bytes, implementation):
    checks.ranges(op, ranges)
    arrays = {
        **_indexer_shapes(iq, ik, iw),
        "q": (q, "B T N P+R"),
        "k": (k, "B S N P+R"),
        "lse": (lse, "B T N"),
    }
    checks.shapes(op, {**arrays, **checks.range_shapes(ranges)})
    _check_indexer(op, iq, ik, iw, lse)
    checks.dtype(op, checks.FLOATS, q=q, k=k)
    unsupported = dense_sm90.unsupported(iq, _rounded(ik, iq), q, k)
    return _config(op, scale, workspace_bytes, implementation, unsupported, ik)


def _indexer_shapes(iq, ik, iw):
    return {"iq": (iq, "B T I H"), "ik": (ik, "B S H"), "iw": (iw, "B T I")}


def _check_indexer(op, iq, ik, iw, lse):
    checks.keys_dtype(op, ("iq", iq), ("ik", ik))
    checks.dtype(op, (jnp.float32,), iw=iw)
    checks.dtype(op, (jnp.float32,), lse=lse)


def _run_dense(iq, ik, iw, q, k, lse, ranges, config: _Config):
    forward, _ = _DENSE[config.implementation]
    kl = forward(iq, _rounded(ik, iq), iw, q, k, lse, ranges, **_options(config))
    return vary_like(kl, (iq, ik, iw, q, k))  # kernels do not say that they do


def _dense_forward(iq, ik, iw, q, k, lse, ranges, config):
    kl = _run_dense(iq, ik, iw, q, k, lse, ranges, config)
    return kl, (iq, _rounded(ik, iq), iw, q, k, lse, ranges)


def _dense_backward(config, residuals, g):
    _, backward = _DENSE[config.implementation]
    diq, dik, diw = backward(*residuals, g, **_options(config), dik_dtype=config.dik_dtype)
    return *vary_like((diq, dik, diw), residuals), None, None, None, None


_dense = jax.custom_vjp(_run_dense, nondiff_argnums=(7,))
_dense.defvjp(_dense_forward, _dense_backward)


def _run_dense_loss(iq, ik, iw, q, k, lse, ranges, row_weights, config: _Config):
    return (row_weights * _run_dense(iq, ik, iw, q, k, lse, ranges, config)).sum()


def _dense_loss_forward(iq, ik, iw, q, k, lse, ranges, row_weights, config):
    run = _DENSE_AT_ONCE[config.implementation]
    kl, gradient = run(
        iq, _rounded(ik, iq), iw, q, k, lse, ranges, row_weights,
        **_options(config), dik_dtype=config.dik_dtype,
    )  # fmt: skip
    kl, gradient = vary_like((kl, tuple(gradient)), (iq, ik, iw, q, k))
    return (row_weights * kl).sum(), gradient


def _dense_loss_backward(config, gradient, g):
    diq, dik, diw = ((g * x).astype(x.dtype) for x in gradient)
    return diq, dik, diw, None, None, None, None, None


_dense_loss = jax.custom_vjp(_run_dense_loss, nondiff_argnums=(8,))
_dense_loss.defvjp(_dense_loss_forward, _dense_loss_backward)


def _options(config: _Config):
    return {"scale": config.scale, "workspace_bytes": config.workspace_bytes}


def _run_sparse(iq, ik, iw, q, kv, lse, indices, config: _Config):
    run = _SPARSE[config.implementation]
    return run(iq, _rounded(ik, iq), iw, q, kv, lse, indices, **_options(config))


def _sparse_forward(iq, ik, iw, q, kv, lse, indices, config):
    run, _ = _SPARSE_GRADIENT[config.implementation]
    return run(iq, _rounded(ik, iq), iw, q, kv, lse, indices, **_options(config))


def _sparse_backward(config, residuals, g):
    _, backward = _SPARSE_GRADIENT[config.implementation]
    diq, dik, diw = backward(residuals, g, **_options(config), dik_dtype=config.dik_dtype)
    return diq, dik, diw, None, None, None, None


_sparse = jax.custom_vjp(_run_sparse, nondiff_argnums=(7,))
_sparse.defvjp(_sparse_forward, _sparse_backward)
