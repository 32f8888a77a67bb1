"""Attention over key ranges, heads apart: `dense_attention`."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from pallas_kernels import checks
from pallas_kernels.dense_attention import backward_sm90, forward_sm90, reference
from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.tiling import WORKSPACE_BYTES, vary_like
from pallas_kernels.types import KeyRange

_ATTEND = {
    "xla": (reference.forward, reference.backward),
    "mosaic": (forward_sm90.forward, backward_sm90.backward),
}


def dense_attention(
    q: Float[Array, "B T N P+R"],
    k: Float[Array, "B S N P+R"],
    v: Float[Array, "B S N V"],
    ranges: KeyRange,
    *,
    scale: float,
    implementation: Implementation = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B T N"]]:
    """Multi-head attention of each query over its key range: MLA's un-absorbed (MHA) mode.

        lse[t, n] = log sum_{start <= s < end} exp(scale q[t, n] . k[s, n])
        out[t, n] = sum_{start <= s < end} exp(scale q[t, n] . k[s, n] - lse[t, n]) v[s, n]

    (MLA of the DeepSeek-V2 report, section 2.1, before absorption). Values may be narrower or
    wider than keys. Softmax and sums are in fp32. Differentiable in q, k and v, through out and
    lse; the backward pass rebuilds the weights from lse and adds the gradients of k and v up in
    fp32.

    For rematerialisation policies the results carry the `checkpoint_name`s "dense_attention.out"
    and "dense_attention.lse": saving both spares the forward pass of the op.

    Args:
        q: queries, nope and rotary part side by side, bf16 or fp32.
        k: keys; dtype of q.
        v: values; dtype of q. k and v must be finite outside the range too.
        ranges: the keys each query may see.
        scale: factor of the dot products before the softmax.
        implementation: `"mosaic"`, `"xla"`, or None for the fastest that serves the call. The
            kernels' gradient serves heads up to 192 and values up to 128 wide; of wider ones it is
            that of `"xla"`.
        workspace_bytes: bound on the temporary memory of the XLA implementation, as long as one
            query of one head, and fp32 copies of the k and v of one head, fit it.

    Returns:
        out in q's dtype, and the natural log-sum-exp in fp32. A query without keys has out 0, lse
        -inf and gives and takes no gradient.

    Raises:
        ValueError, TypeError: arguments that contradict each other.
        UnsupportedError: `implementation` cannot serve the call.
    """
    op = "dense_attention"
    checks.ranges(op, ranges)
    arrays = {"q": (q, "B T N P+R"), "k": (k, "B S N P+R"), "v": (v, "B S N V")}
    checks.shapes(op, {**arrays, **checks.range_shapes(ranges)})
    checks.dtype(op, checks.FLOATS, q=q, k=k, v=v)
    config = _Config(
        scale=checks.scale(op, scale),
        workspace_bytes=checks.positive_int(op, "workspace_bytes", workspace_bytes),
        implementation=choose(op, implementation, forward_sm90.unsupported(q, v)),
    )
    arguments = (q, k, v, ranges)
    return _attend(*vary_like(arguments, arguments), config)


class _Config(NamedTuple):
    scale: float
    workspace_bytes: int
    implementation: str


def _run(q, k, v, ranges, config: _Config) -> tuple[jax.Array, jax.Array]:
    forward, _ = _ATTEND[config.implementation]
    results = forward(q, k, v, ranges, scale=config.scale, workspace_bytes=config.workspace_bytes)
    return vary_like(results, (q, k, v))  # kernels do not say that they do


def _attend_forward(q, k, v, ranges, config):
    out, lse = _run(q, k, v, ranges, config)
    out = checkpoint_name(out, "dense_attention.out")
    lse = checkpoint_name(lse, "dense_attention.lse")
    return (out, lse), (q, k, v, ranges, out, lse)


def _attend_backward(config, residuals, gradients):
    _, backward = _ATTEND[config.implementation]
    dq, dk, dv = backward(
        *residuals, *gradients, scale=config.scale, workspace_bytes=config.workspace_bytes
    )
    return *vary_like((dq, dk, dv), residuals), None


_attend = jax.custom_vjp(_run, nondiff_argnums=(4,))
_attend.defvjp(_attend_forward, _attend_backward)
