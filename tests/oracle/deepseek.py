"""DeepSeek's own inference numerics in NumPy, as corrected on 17 November 2025.

Written from the published formulas and roundings, sharing no code with the package: e4m3 and bf16
by arithmetic, rotary embedding by complex numbers, the Hadamard rotation by butterflies, routing
by sorting. Arrays hold float64 numbers that are exact in the format a comment or name says;
`bf16` rounds where the official code stores bf16. Weights are `[in, out]`, by the dotted names of
a layer; an FP8 weight has a `scale` beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

BLOCK = 128  # columns that share a scale


# Formats.


def _round_to(x: np.ndarray, mantissa: int, least_exponent: int) -> np.ndarray:
    """To the nearest number with so many mantissa bits, ties to even; subnormals included."""
    _, exponent = np.frexp(x)  # |x| = m 2^exponent, m in [1/2, 1)
    step = 2.0 ** (np.maximum(exponent - 1, least_exponent) - mantissa)
    return np.rint(x / step) * step


def bf16(x: np.ndarray) -> np.ndarray:
    return _round_to(np.float64(np.float32(x)), 7, -126)


def e4m3(x: np.ndarray) -> np.ndarray:
    return np.clip(_round_to(np.clip(x, -448.0, 448.0), 3, -6), -448.0, 448.0)


def act_quant(x: np.ndarray, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """e4m3 values and one power-of-two scale per block; the floor of 1e-4 is on the maximum."""
    blocks = np.float32(x).reshape(*x.shape[:-1], -1, block)
    scale = np.maximum(np.abs(blocks).max(-1), np.float32(1e-4)) * np.float32(1 / 448)
    m, exponent = np.frexp(scale)
    scale = 2.0 ** (exponent - (m == 0.5))  # up to a power of two; one already stays
    return e4m3(blocks / scale[..., None]).reshape(x.shape), scale


def fp8_round_trip(x: np.ndarray) -> np.ndarray:
    q, scale = act_quant(x)
    return bf16((q.reshape(*scale.shape, -1) * scale[..., None]).reshape(x.shape))


def weight_quant(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """e4m3 values and power-of-two scales of `[..., in, out]` weights, in tiles of 128 x 128."""
    q, rows = np.empty(w.shape), []
    for i in range(0, w.shape[-2], BLOCK):
        row = []
        for j in range(0, w.shape[-1], BLOCK):
            tile = w[..., i : i + BLOCK, j : j + BLOCK]
            scale = 2.0 ** np.ceil(np.log2(np.abs(tile).max((-2, -1)) / 448))
            q[..., i : i + BLOCK, j : j + BLOCK] = e4m3(tile / scale[..., None, None])
            row.append(scale)
        rows.append(np.stack(row, -1))
    return q, np.stack(rows, -2)


def dequantised(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    wide = np.repeat(np.repeat(scale, BLOCK, -2), BLOCK, -1)
    return bf16(q * wide[..., : q.shape[-2], : q.shape[-1]])


# Building blocks.


def fp8_gemm(x: np.ndarray, q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`x W` with x quantised too; partial sums over 128 rows are scaled and added in fp32."""
    x8, x_scale = act_quant(x)
    total = np.zeros((*x.shape[:-1], q.shape[-1]), np.float32)
    for b in range(q.shape[-2] // BLOCK):
        part = x8[..., b * BLOCK : (b + 1) * BLOCK] @ q[b * BLOCK : (b + 1) * BLOCK]
        columns = np.repeat(scale[b], BLOCK)[: q.shape[-1]]
        total += np.float32(part * x_scale[..., b, None] * columns)
    return bf16(total)


def linear(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    if f"{name}.scale" in p:
        return fp8_gemm(x, p[f"{name}.weight"], p[f"{name}.scale"])
    return bf16(x @ p[f"{name}.weight"])


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return bf16(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return bf16(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight + bias)


def turns(c: Any, positions: np.ndarray) -> np.ndarray:
    """`e^(i angle)` of each position and pair, with YaRN's ramp between kept and divided pairs."""
    R, yarn = c.qk_rope_head_dim, c.rope_scaling
    f = c.rope_theta ** (-np.arange(0, R, 2) / R)

    def pair(rotations: float) -> float:
        span = yarn.original_max_position_embeddings / (rotations * 2 * np.pi)
        return R * np.log(span) / (2 * np.log(c.rope_theta))

    low = max(np.floor(pair(yarn.beta_fast)), 0)
    high = min(np.ceil(pair(yarn.beta_slow)), R - 1)
    keep = 1 - np.clip((np.arange(R // 2) - low) / (high - low), 0, 1)
    f = f / yarn.factor * (1 - keep) + f * keep
    return np.exp(1j * positions[:, None] * f)


def rope(x: np.ndarray, turn: np.ndarray, interleaved: bool) -> np.ndarray:
    """Turns pairs of the last axis of `[T, ..., R]`: (2i, 2i+1), or (i, i + R/2)."""
    half = x.shape[-1] // 2
    shape = (len(turn), *[1] * (x.ndim - 2), half)
    pairs = x.reshape(*x.shape[:-1], half, 2) if interleaved else None
    a, b = (pairs[..., 0], pairs[..., 1]) if pairs is not None else (x[..., :half], x[..., half:])
    z = (a + 1j * b) * turn.reshape(shape)
    if interleaved:
        return bf16(np.stack([z.real, z.imag], -1).reshape(x.shape))
    return bf16(np.concatenate([z.real, z.imag], -1))


def walsh(x: np.ndarray) -> np.ndarray:
    """The orthonormal Hadamard rotation in natural order, by butterflies."""
    width, step = x.shape[-1], 1
    y = x
    while step < width:
        pairs = y.reshape(*x.shape[:-1], -1, 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([a + b, a - b], -2).reshape(x.shape)
        step *= 2
    return bf16(y * width**-0.5)


# The indexer.


class Indexed(NamedTuple):
    """q8 `[T, I, H]` and k8 `[T, H]` in e4m3, w `[T, I]` with all scales of the query, k_scale."""

    q8: np.ndarray
    k8: np.ndarray
    w: np.ndarray
    k_scale: np.ndarray


def indexer(c: Any, p: dict, x: np.ndarray, q_latent: np.ndarray, turn: np.ndarray) -> Indexed:
    """What the scores are made of; one scale per token and head, since a head is one block."""
    I, H, R = c.index_n_heads, c.index_head_dim, c.qk_rope_head_dim
    name = "self_attn.indexer."
    q = linear(p, name + "wq_b", q_latent).reshape(-1, I, H)
    k = layer_norm(linear(p, name + "wk", x), p[name + "k_norm.weight"], p[name + "k_norm.bias"])
    # The *first* columns turn, and in halves; the attention's are the last, and in pairs.
    q, k = (np.concatenate([rope(y[..., :R], turn, False), y[..., R:]], -1) for y in (q, k))
    (q8, q_scale), (k8, k_scale) = act_quant(walsh(q), H), act_quant(walsh(k), H)
    w = np.float32(x @ p[name + "weights_proj.weight"]) * I**-0.5  # fp32, not bf16
    return Indexed(q8, k8, w * q_scale[..., 0] * H**-0.5, k_scale[..., 0])


def index_scores(index: Indexed) -> np.ndarray:
    """`I[t, s]`, -inf where s > t."""
    dots = np.einsum("tih,sh->tis", index.q8, index.k8)
    scores = np.einsum("ti,tis->ts", index.w, np.maximum(dots, 0)) * index.k_scale
    return np.where(np.tri(len(scores), dtype=bool), scores, -np.inf)


def top_keys(scores: np.ndarray, topk: int) -> list[set[int]]:
    """Of each row, the visible keys of highest score; ties to the lower index."""
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :topk]
    return [{int(s) for s in row if s <= t} for t, row in enumerate(order)]


# Attention.


class Projected(NamedTuple):
    """q_nope `[T, N, P]`, q_rope `[T, N, R]`, latent `[T, C]`, k_rope `[T, R]`, q_latent."""

    q_nope: np.ndarray
    q_rope: np.ndarray
    latent: np.ndarray
    k_rope: np.ndarray
    q_latent: np.ndarray


def project(c: Any, p: dict, x: np.ndarray, turn: np.ndarray) -> Projected:
    N, P, C = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
    eps = c.rms_norm_eps
    q_latent = rms_norm(
        linear(p, "self_attn.q_a_proj", x), p["self_attn.q_a_layernorm.weight"], eps
    )
    q = linear(p, "self_attn.q_b_proj", q_latent).reshape(len(x), N, -1)
    kv = linear(p, "self_attn.kv_a_proj_with_mqa", x)
    latent = rms_norm(kv[:, :C], p["self_attn.kv_a_layernorm.weight"], eps)
    return Projected(
        q[..., :P],
        rope(q[..., P:], turn, True),
        fp8_round_trip(latent),  # the rotary key is not rounded
        rope(kv[:, C:], turn, True),
        q_latent,
    )


def softmax_scale(c: Any) -> float:
    m = 0.1 * c.rope_scaling.mscale_all_dim * np.log(c.rope_scaling.factor) + 1
    return (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5 * m * m


def _softmax(scores: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    scores = np.where(allowed, scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mask_of(keys: list[set[int]]) -> np.ndarray:
    mask = np.zeros((len(keys), len(keys)), bool)
    for t, row in enumerate(keys):
        mask[t, list(row)] = True
    return mask


def mha(c: Any, p: dict, y: Projected, keys: list[set[int]], rounded: bool = False) -> np.ndarray:
    """Prefill: keys and values expanded by the FP8 product; update of the residual, `[T, D]`.

    Args:
        c: the config.
        p: the layer's parameters.
        y: from `project`.
        keys: of each query, the keys it attends to.
        rounded: keep scores and probabilities in bf16, as the official code does since the fix.
            The package computes both in fp32, as before it and as the serving kernels do.
    """
    N, P = c.num_attention_heads, c.qk_nope_head_dim
    kv = linear(p, "self_attn.kv_b_proj", y.latent).reshape(len(y.latent), N, -1)
    low = bf16 if rounded else np.asarray
    scores = np.einsum("tnp,snp->nts", y.q_nope, kv[..., :P])
    scores = low(scores + np.einsum("tnr,sr->nts", y.q_rope, y.k_rope)) * softmax_scale(c)
    weights = low(_softmax(low(scores), mask_of(keys)))
    out = bf16(np.einsum("nts,snv->tnv", weights, kv[..., P:]))
    return linear(p, "self_attn.o_proj", out.reshape(len(out), -1))


def mqa(c: Any, p: dict, y: Projected, keys: list[set[int]], rounded: bool = False) -> np.ndarray:
    """Decode: the expansion, dequantised to bf16, is absorbed; arguments as for `mha`."""
    N, P, C = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
    name = "self_attn.kv_b_proj."
    up = dequantised(p[name + "weight"], p[name + "scale"]).reshape(C, N, -1)
    q = bf16(np.einsum("tnp,cnp->tnc", y.q_nope, up[..., :P]))
    low = bf16 if rounded else np.asarray
    scores = low(np.einsum("tnc,sc->nts", q, y.latent))
    scores = low(scores + low(np.einsum("tnr,sr->nts", y.q_rope, y.k_rope))) * softmax_scale(c)
    weights = low(_softmax(low(scores), mask_of(keys)))
    latent = bf16(np.einsum("nts,sc->tnc", weights, y.latent))
    out = bf16(np.einsum("tnc,cnv->tnv", latent, up[..., P:]))
    return linear(p, "self_attn.o_proj", out.reshape(len(out), -1))


# Experts.


def gate(c: Any, p: dict, x: np.ndarray) -> list[dict[int, float]]:
    """The experts of each token and what their outputs are multiplied by."""
    affinity = 1 / (1 + np.exp(-np.float32(x @ p["mlp.gate.weight"])))
    biased = affinity + p["mlp.gate.e_score_correction_bias"]
    size = c.n_routed_experts // c.n_group
    routed = []
    for s, b in zip(affinity, biased, strict=True):
        groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
        groups.sort(key=lambda g: -sum(sorted(b[e] for e in g)[-2:]))
        eligible = [e for group in groups[: c.topk_group] for e in group]
        best = sorted(eligible, key=lambda e: -b[e])[: c.num_experts_per_tok]
        total = sum(s[e] for e in best)
        routed.append({e: s[e] / total * c.routed_scaling_factor for e in best})
    return routed


def _swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return bf16(gate / (1 + np.exp(-gate)) * up)


def mlp(p: dict, name: str, x: np.ndarray) -> np.ndarray:
    hidden = _swiglu(linear(p, f"{name}gate_proj", x), linear(p, f"{name}up_proj", x))
    return linear(p, f"{name}down_proj", hidden)


def moe(c: Any, p: dict, x: np.ndarray) -> np.ndarray:
    """The weighted experts' sum, in fp32, and the shared expert, unweighted; rounded once."""
    out = mlp(p, "mlp.shared_experts.", x)
    for t, experts in enumerate(gate(c, p, x)):
        for e, weight in experts.items():
            one = {
                f"{n}.{kind}": p[f"mlp.experts.{n}{suffix}"][e]
                for n in ("gate_proj", "up_proj", "down_proj")
                for kind, suffix in (("weight", ""), ("scale", "_scale"))
            }
            out[t] += weight * mlp(one, "", x[t : t + 1])[0]
    return bf16(out)
