"""Attention over selected keys: `sparse_attention`, and from a paged cache `..._decode`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.sparse_attention import backward_sm90, forward_sm90, reference
from pallas_kernels.sparse_attention.pages import CachePages, Fp8Pages
from pallas_kernels.tiling import WORKSPACE_BYTES, vary_like
from pallas_kernels.types import Selection

# A kernel goes in here, beside the reference, and its limits into the choice of the op.
_ATTEND = {
    "xla": (reference.forward, reference.backward),
    "mosaic": (forward_sm90.forward, backward_sm90.backward),
}
_DECODE = {"xla": reference.decode}


def sparse_attention(
    q: Float[Array, "B T N C+R"],
    kv: Float[Array, "B S C+R"],
    selection: Selection,
    *,
    value_width: int,
    scale: float,
    keys_axis: str | None = None,
    implementation: Implementation = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B T N"]]:
    """Multi-query attention of each query over its selected keys: MLA's absorbed mode under DSA.

        lse[t, n] = log sum_{s selected} exp(scale q[t, n] . kv[s])
        out[t, n] = sum_{s selected} exp(scale q[t, n] . kv[s] - lse[t, n]) kv[s, :value_width]

    (DeepSeek-V3.2-Exp report, equation 2, on MLA with `W_UK` absorbed into the query). All heads
    share the row of a key, whose first columns are also the value. Softmax and sums are in fp32.
    Differentiable in q and kv, through out and lse; the backward pass rebuilds the weights from
    lse and adds the gradient of kv up in fp32: the kernel always, and XLA on CPU, in a fixed order,
    so bit-equal between runs.

    Rows of kv that are not selected are never used, whatever they hold. For rematerialisation
    policies the results carry the `checkpoint_name`s "sparse_attention.out" and
    "sparse_attention.lse": saving both spares the forward pass of the op.

    Args:
        q: absorbed queries, bf16 or fp32.
        kv: latent and rotary key of each position; dtype of q, or fp32 beside a q in bf16: it is
            rounded to q's dtype first, and its gradient is not, so that it can be added up further.
        selection: which keys each query attends to. Entries outside `0..S-1` are ignored.
        value_width: how many first columns of kv are the value: C.
        scale: factor of the dot products before the softmax.
        keys_axis: inside `shard_map`, the mesh axis over whose devices the keys are dealt out in
            order (context parallelism): kv is this device's share, indices count through all. The
            op gathers the keys, and adds their gradient up over the devices in fp32.
        implementation: `"mosaic"`, `"xla"`, or None for the fastest that serves the call.
        workspace_bytes: bound on the temporary memory of the XLA implementation, as long as one
            query, and in the backward pass a fp32 copy of one row of kv, fit it. The backward
            kernel takes 4 GiB where it is less and the call is large enough to use them.

    Returns:
        out in q's dtype, and the natural log-sum-exp in fp32. A query without keys has out 0, lse
        -inf and gives and takes no gradient.

    Raises:
        ValueError, TypeError: arguments that contradict each other.
        UnsupportedError: `implementation` cannot serve the call.
    """
    op = "sparse_attention"
    checks.selection(op, selection)
    lengths = checks.shapes(
        op,
        {
            "q": (q, "B T N C+R"),
            "kv": (kv, "B S C+R"),
            "selection.indices": (selection.indices, "B T K"),
        },
    )
    checks.keys_dtype(op, ("q", q), ("kv", kv))
    value_width = checks.positive_int(op, "value_width", value_width, at_most=lengths["C+R"])
    scale = checks.scale(op, scale)
    unsupported = forward_sm90.unsupported(q, kv.astype(q.dtype), value_width=value_width)
    config = _Config(
        value_width=value_width,
        scale=scale,
        workspace_bytes=checks.positive_int(op, "workspace_bytes", workspace_bytes),
        implementation=choose(op, implementation, unsupported),
        keys_axis=keys_axis,
        gradient=jnp.dtype(kv.dtype),
    )
    arguments = (q, kv, selection.indices)
    return _attend(*vary_like(arguments, arguments), config)


def sparse_attention_decode(
    q: Float[Array, "B T N C+R"],
    pages: CachePages,
    slots: Int32[Array, "B T K"],
    *,
    value_width: int,
    scale: float,
    implementation: Implementation = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B T N"]]:
    """`sparse_attention` that reads its keys from a paged cache: for generation, without gradient.

    Args:
        q: absorbed queries, bf16 or fp32. T is 1, or a few with speculative decoding.
        pages: the cache, shared by all rows of the batch: an array `[pages, page_size, C+R]` in
            bf16 or fp32, or `Fp8Pages`.
        slots: physical slots `page * page_size + offset` of the selected keys, in any order; what
            is outside the cache (-1) is ignored.
        value_width: how many first columns of a row are the value: C.
        scale: factor of the dot products before the softmax.
        implementation: `"mosaic"`, `"xla"`, or None for the fastest that serves the call.
        workspace_bytes: bound on the temporary memory of the XLA implementation, as long as one
            query fits it.

    Returns:
        out in q's dtype, and the natural log-sum-exp in fp32; 0 and -inf for a query without keys.

    Raises:
        ValueError, TypeError: arguments that contradict each other.
        UnsupportedError: `implementation` cannot serve the call.
        NotImplementedError: the call is differentiated.
    """
    op = "sparse_attention_decode"
    width = _check_pages(op, pages)
    lengths = checks.shapes(op, {"q": (q, "B T N C+R"), "slots": (slots, "B T K")})
    if lengths["C+R"] != width:
        raise ValueError(
            f"{op}: q has shape {q.shape}, so C+R = {lengths['C+R']}, but a row of pages has "
            f"{width} columns (latent and rotary part together); they must be equal. Pass the "
            "absorbed query, or the pages of this model."
        )
    checks.dtype(op, checks.FLOATS, q=q)
    checks.dtype(op, (jnp.int32,), slots=slots)
    widest = pages.latent.shape[-1] if isinstance(pages, Fp8Pages) else width
    config = _Config(
        value_width=checks.positive_int(op, "value_width", value_width, at_most=widest),
        scale=checks.scale(op, scale),
        workspace_bytes=checks.positive_int(op, "workspace_bytes", workspace_bytes),
        implementation=choose(op, implementation, "this op has no Mosaic kernel yet"),
    )
    arguments = (q, pages, slots)
    return _decode(*vary_like(arguments, arguments), config)


def _check_pages(op: str, pages: CachePages) -> int:
    """Checks a paged cache and returns the width of its rows."""
    if not isinstance(pages, Fp8Pages):
        lengths = checks.shapes(op, {"pages": (pages, "pages page_size C+R")})
        checks.dtype(op, checks.FLOATS, pages=pages)
        return lengths["C+R"]
    lengths = checks.shapes(
        op,
        {
            "pages.latent": (pages.latent, "pages page_size C"),
            "pages.scale": (pages.scale, "pages page_size blocks"),
            "pages.rope": (pages.rope, "pages page_size R"),
        },
    )
    checks.dtype(op, (jnp.float8_e4m3fn,), **{"pages.latent": pages.latent})
    checks.dtype(op, (jnp.float32,), **{"pages.scale": pages.scale})
    checks.dtype(op, checks.FLOATS, **{"pages.rope": pages.rope})
    if lengths["C"] % lengths["blocks"]:
        raise ValueError(
            f"{op}: pages.scale has {lengths['blocks']} blocks, which do not divide the "
            f"{lengths['C']} columns of pages.latent; columns share scales in whole blocks. "
            "Build the pages with Fp8Pages.zeros."
        )
    return lengths["C"] + lengths["R"]


class _Config(NamedTuple):
    value_width: int
    scale: float
    workspace_bytes: int
    implementation: str
    keys_axis: str | None = None
    gradient: jnp.dtype | None = None  # of kv


def _all_keys(q, kv, config: _Config):
    kv = kv.astype(q.dtype)
    if config.keys_axis is None:
        return kv
    return jax.lax.all_gather(kv, config.keys_axis, axis=1, tiled=True)


def _run(q, kv, indices, config: _Config) -> tuple[jax.Array, jax.Array]:
    forward, _ = _ATTEND[config.implementation]
    results = forward(
        q,
        _all_keys(q, kv, config),
        indices,
        value_width=config.value_width,
        scale=config.scale,
        workspace_bytes=config.workspace_bytes,
    )
    return vary_like(results, (q, kv))  # kernels do not say that they do


def _attend_forward(q, kv, indices, config):
    out, lse = _run(q, kv, indices, config)
    out = checkpoint_name(out, "sparse_attention.out")
    lse = checkpoint_name(lse, "sparse_attention.lse")
    return (out, lse), (q, kv.astype(q.dtype), indices, out, lse)


def _attend_backward(config, residuals, gradients):
    _, backward = _ATTEND[config.implementation]
    q, kv, *others = residuals
    dq, dkv = backward(
        q,
        _all_keys(q, kv, config),
        *others,
        *gradients,
        scale=config.scale,
        workspace_bytes=config.workspace_bytes,
        dkv_dtype=config.gradient if config.keys_axis is None else jnp.float32,
    )
    if config.keys_axis is not None:
        dkv = jax.lax.psum_scatter(dkv, config.keys_axis, scatter_dimension=1, tiled=True)
    return dq, dkv.astype(config.gradient), None


_attend = jax.custom_vjp(_run, nondiff_argnums=(3,))
_attend.defvjp(_attend_forward, _attend_backward)


def _run_decode(q, pages, slots, config: _Config) -> tuple[jax.Array, jax.Array]:
    return _DECODE[config.implementation](
        q,
        pages,
        slots,
        value_width=config.value_width,
        scale=config.scale,
        workspace_bytes=config.workspace_bytes,
    )


def _decode_forward(q, pages, slots, config):
    return _run_decode(q, pages, slots, config), None


def _decode_backward(config, residuals, gradients):
    raise NotImplementedError(
        "sparse_attention_decode has no gradient: it reads a cache to generate. Train through "
        "sparse_attention, or detach its arguments with jax.lax.stop_gradient."
    )


_decode = jax.custom_vjp(_run_decode, nondiff_argnums=(3,))
_decode.defvjp(_decode_forward, _decode_backward)
