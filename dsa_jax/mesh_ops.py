"""The attention's ops on a mesh: the one place where kernels meet devices.

Queries stay where they are. What a device needs of the others' keys is gathered here: the latent
with its rotary key (C + R wide) and the indexer's key (H wide), never keys and values per head.
Under tensor parallelism each device attends with its own heads, and all choose the same keys.
Without a mesh these are the ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32

import pallas_kernels as ops
from dsa_jax.indexer import IndexerHeads
from dsa_jax.linear import Linear
from dsa_jax.sharding import Rules
from dsa_jax.spread import (
    all_keys,
    axes_of,
    by_query,
    deal_queries,
    mesh_sizes,
    order_of,
    per_device,
    spec,
)
from pallas_kernels import KeyRange, Selection


def _heads_letters(heads: IndexerHeads) -> IndexerHeads:
    scale = None if heads.k_scale is None else "B T"
    return IndexerHeads("B T _ _", "B T _", "B T _", scale)  # pyright: ignore[reportArgumentType]


def _keys(rules: Rules) -> Callable[[Array], Array]:
    """What makes a device's keys all keys."""
    return functools.partial(all_keys, axes=axes_of(rules, "T"), devices=order_of(rules))


def _heads_split(rules: Rules) -> Callable[[Array], PartitionSpec]:
    """How the attention leaves arrays with heads."""
    return lambda x: spec(rules, "B T N" + " _" * (x.ndim - 3))


def by_head(x: Float[Array, "B T N a"], w: Float[Array, "N a b"]) -> Float[Array, "B T N b"]:
    """`out[b, t, n] = x[b, t, n] @ w[n]`.

    On one device with the tokens as one axis: so the compiler has the matmul write each head's
    columns where its reader wants them. With two axes it writes head after head, and a copy of all
    puts them in order. On a mesh the axes stay, for the partitioner cuts them.
    """
    if mesh_sizes():
        return jnp.einsum("BTNa,Nab->BTNb", x, w)
    flat = x.reshape(-1, *x.shape[2:])
    out = lax.dot_general(flat, w, (((2,), (1,)), ((1,), (0,))))  # N first
    return jnp.swapaxes(out, 0, 1).reshape(*x.shape[:3], -1)


_RANGES = KeyRange("B T", "B T")  # pyright: ignore[reportArgumentType]


def lightning_indexer(
    heads: IndexerHeads, ranges: KeyRange, *, topk: int, rules: Rules
) -> Selection:
    """The keys that every query attends to; as `pallas_kernels.lightning_indexer`.

    Args:
        heads: queries, keys and weights of the tokens.
        ranges: the keys each query may see, in natural order.
        topk: how many.
        rules: from letters to axes.
    """
    rules = by_query(rules)
    keys = _keys(rules)

    def local(heads: IndexerHeads, ranges: KeyRange) -> Array:
        k = keys(heads.k)
        k_scale = None if heads.k_scale is None else keys(heads.k_scale)
        return ops.lightning_indexer(
            heads.q, k, heads.w, ranges, topk=topk, k_scale=k_scale
        ).indices

    arguments = (_heads_letters(heads), _RANGES)
    run = per_device(local, rules, arguments, "B T _")
    return Selection(run(*lax.stop_gradient((heads, ranges))))


def sparse_attention(
    q: Float[Array, "B T N C+R"],
    kv: Float[Array, "B T C+R"],
    selection: Selection,
    *,
    value_width: int,
    scale: float,
    rules: Rules,
) -> tuple[Float[Array, "B T N C"], Float32[Array, "B T N"]]:
    """Attention over selected keys; as `pallas_kernels.sparse_attention`."""
    keys = _keys(rules)

    def local(q: Array, kv: Array, indices: Array) -> tuple[Array, Array]:
        return ops.sparse_attention(
            q, keys(kv), Selection(indices), value_width=value_width, scale=scale
        )

    arguments = ("B T N _", "B T _", "B T _")
    run = per_device(local, rules, arguments, ("B T N _", "B T N"))
    return run(q, kv, selection.indices)


def expand_keys(
    expanded: Float[Array, "B S N P+V"], rope: Float[Array, "B S R"], P: int
) -> tuple[Float[Array, "B S N P+R"], Float[Array, "B S N V"]]:
    """Per-head keys and values.

    Args:
        expanded: `kv_b_proj` of the latents, per head first the keys' P columns, then the values.
        rope: the rotary key, which all heads share.
        P: where to split.
    """
    nope, v = expanded[..., :P], expanded[..., P:]
    shared = jnp.broadcast_to(rope[:, :, None], (*nope.shape[:-1], rope.shape[-1]))
    return jnp.concatenate([nope, shared], axis=-1), v


def per_head(
    up: Linear, kv: Float[Array, "B S C+R"], q: Float[Array, "B T N P+R"]
) -> tuple[Float[Array, "B S N P+R"], Float[Array, "B S N V"]]:
    """Keys and values of the heads that q has.

    Args:
        up: `kv_b_proj`.
        kv: latents, and beside them the rotary keys.
        q: queries.
    """
    C = up.weight.shape[0]
    latent, rope = kv[..., :C], kv[..., C:]
    expanded = up(latent).reshape(*kv.shape[:2], q.shape[2], -1)
    return expand_keys(expanded, rope, q.shape[3] - rope.shape[2])


def dense_attention(
    q: Float[Array, "B T N P+R"],
    kv: Float[Array, "B T C+R"],
    up: Linear,
    ranges: KeyRange,
    *,
    scale: float,
    rules: Rules,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B T N"]]:
    """Attention over key ranges; as `pallas_kernels.dense_attention` of the expanded keys.

    Every device expands the latents of all keys, of its own heads: 2 S C N (P + V) operations,
    against an exchange of N (P + V) / (C + R) times as much.
    """
    keys = _keys(rules)

    def local(q: Array, kv: Array, up: Linear, ranges: KeyRange) -> tuple[Array, Array]:
        k, v = per_head(up, keys(kv), q)
        return ops.dense_attention(q, k, v, ranges, scale=scale)

    arguments = ("B T N _", "B T _", jax.tree.map(lambda _: "_ N", up), _RANGES)
    run = per_device(local, rules, arguments, ("B T N _", "B T N"))
    return run(q, kv, up, ranges)


def indexer_kl_dense_loss(
    heads: IndexerHeads,
    q: Float[Array, "B T N P+R"],
    kv: Float[Array, "B T C+R"],
    up: Linear,
    lse: Float32[Array, "B T N"],
    ranges: KeyRange,
    row_weights: Float32[Array, "B T"],
    *,
    scale: float,
    rules: Rules,
) -> Float32[Array, ""]:
    """The warm-up loss of all tokens; as `pallas_kernels.indexer_kl_dense_loss`."""
    deal, heads_split = deal_queries(rules), _heads_split(rules)
    rules = by_query(rules)
    keys, over = _keys(rules), axes_of(rules, "B") + axes_of(rules, "T")

    def local(heads: IndexerHeads, q, kv, up, lse, ranges, row_weights) -> Array:
        q, lse = deal(q), deal(lse)
        # Expanded once more: the compiler finds that attention has done so already.
        k, _ = per_head(up, keys(kv), q)
        ik = keys(heads.k)
        loss = ops.indexer_kl_dense_loss(
            heads.q, ik, heads.w, q, k, lse, ranges, row_weights, scale=scale
        )
        return lax.psum(loss, over) if over else loss

    whole = jax.tree.map(lambda _: "_ N", up)
    arguments = (
        _heads_letters(heads), heads_split(q), "B T _", whole, heads_split(lse), _RANGES, "B T"
    )  # fmt: skip
    return per_device(local, rules, arguments, "")(heads, q, kv, up, lse, ranges, row_weights)


def indexer_kl_sparse(
    heads: IndexerHeads,
    q: Float[Array, "B T N C+R"],
    kv: Float[Array, "B T C+R"],
    lse: Float32[Array, "B T N"],
    selection: Selection,
    *,
    scale: float,
    rules: Rules,
) -> Float32[Array, "B T"]:
    """The loss of the sparse stage, per query; as `pallas_kernels.indexer_kl_sparse`."""
    deal, heads_split = deal_queries(rules), _heads_split(rules)
    rules = by_query(rules)
    keys = _keys(rules)

    def local(heads: IndexerHeads, q, kv, lse, indices) -> Array:
        ik, kv, q, lse = keys(heads.k), keys(kv), deal(q), deal(lse)
        return ops.indexer_kl_sparse(
            heads.q, ik, heads.w, q, kv, lse, Selection(indices), scale=scale
        )

    arguments = (_heads_letters(heads), heads_split(q), "B T _", heads_split(lse), "B T _")
    return per_device(local, rules, arguments, "B T")(heads, q, kv, lse, selection.indices)
