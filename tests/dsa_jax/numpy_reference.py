"""The whole model in float64 NumPy, one token, head and expert at a time.

Written from the report's formulas, not from the package: un-absorbed attention over an explicit
list of keys, rotary embedding by complex numbers, routing by sorting.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from dsa_jax.config import ModelConfig


def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x, weight, bias, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight + bias


def silu(x):
    return x / (1 + np.exp(-x))


def angles(config: ModelConfig, position: int) -> np.ndarray:
    """Radians of each pair at a position."""
    R, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    i = np.arange(R // 2)
    f = theta ** (-2 * i / R)
    if yarn is not None:
        turns = yarn.original_max_position_embeddings * f / (2 * np.pi)
        exact = np.log(turns) / np.log(theta) * R / 2  # pair index at which `turns` would be 1

        def index(beta):
            return i[0] + exact[0] - np.log(beta) / np.log(theta) * R / 2

        low, high = (
            max(np.floor(index(yarn.beta_fast)), 0),
            min(np.ceil(index(yarn.beta_slow)), R - 1),
        )
        ramp = np.clip((i - low) / (high - low), 0, 1)
        f = f * (1 - ramp) + f / yarn.factor * ramp
    return position * f


def turn(x, angle, interleaved):
    """Rotates the last axis; pairs are complex numbers."""
    if interleaved:
        z = x[..., 0::2] + 1j * x[..., 1::2]
    else:
        half = x.shape[-1] // 2
        z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * angle)
    if interleaved:
        return np.stack([z.real, z.imag], -1).reshape(x.shape)
    return np.concatenate([z.real, z.imag], -1)


def fp8(x):
    """e4m3 with one power-of-two scale for the whole of the last axis."""
    amax = max(np.abs(x).max(), 1e-4)
    scale = 2.0 ** np.ceil(np.log2(np.float32(amax) / np.float32(448)))
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64), scale


def walsh(x):
    """Hadamard transform by its definition: sign (-1)^(popcount of i & j)."""
    n = x.shape[-1]
    sign = np.array([[(-1) ** bin(i & j).count("1") for j in range(n)] for i in range(n)])
    return x @ sign / np.sqrt(n)


class Layer:
    """One layer over one document; `keys` grows as tokens come."""

    def __init__(self, config: ModelConfig, params: dict[str, np.ndarray]):
        self.c, self.p = config, params
        self.latents, self.ropes, self.index_keys = [], [], []

    def attention(self, x, position, shared, dense):
        """Attends with one token; returns the update and the selected keys."""
        c, p = self.c, self.p
        N, P, R, V = (
            c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim,
        )  # fmt: skip
        angle = angles(c, position)
        q_latent = rms(
            x @ p["self_attn.q_a_proj.weight"], p["self_attn.q_a_layernorm.weight"], c.rms_norm_eps
        )
        q = (q_latent @ p["self_attn.q_b_proj.weight"]).reshape(N, P + R)
        kv = x @ p["self_attn.kv_a_proj_with_mqa.weight"]
        latent = rms(kv[: c.kv_lora_rank], p["self_attn.kv_a_layernorm.weight"], c.rms_norm_eps)
        if c.numerics.kv_latent_fp8:
            blocks = [fp8(b) for b in latent.reshape(-1, 128)]
            latent = np.concatenate([q * s for q, s in blocks])
        self.latents.append(latent)
        self.ropes.append(turn(kv[c.kv_lora_rank :], angle, True))
        selected = list(range(len(self.latents)))
        if not dense:
            selected = self.select(x, q_latent, angle) if shared is None else shared
        scale = (P + R) ** -0.5
        if c.rope_scaling is not None:
            scale *= (0.1 * c.rope_scaling.mscale_all_dim * np.log(c.rope_scaling.factor) + 1) ** 2
        up = p["self_attn.kv_b_proj.weight"].reshape(-1, N, P + V)
        out = []
        for n in range(N):
            scores, values = [], []
            for s in selected:
                k_nope = self.latents[s] @ up[:, n, :P]
                values.append(self.latents[s] @ up[:, n, P:])
                rope = turn(q[n, P:], angle, True) @ self.ropes[s]
                scores.append(scale * (q[n, :P] @ k_nope + rope))
            e = np.exp(np.array(scores) - max(scores))
            out.append((e / e.sum()) @ np.array(values))
        return np.concatenate(out) @ p["self_attn.o_proj.weight"], selected

    def select(self, x, q_latent, angle):
        c, p = self.c, self.p
        R, I, H = c.qk_rope_head_dim, c.index_n_heads, c.index_head_dim
        name = "self_attn.indexer."
        q = (q_latent @ p[name + "wq_b.weight"]).reshape(I, H)
        k = layer_norm(
            x @ p[name + "wk.weight"],
            p[name + "k_norm.weight"],
            p[name + "k_norm.bias"],
            c.index_norm_eps,
        )
        w = x @ p[name + "weights_proj.weight"] * I**-0.5 * H**-0.5
        layout = c.indexer_rope_interleave
        q = np.concatenate([turn(q[:, :R], angle, layout), q[:, R:]], -1)
        k = np.concatenate([turn(k[:R], angle, layout), k[R:]])
        if c.numerics.indexer_hadamard:
            q, k = walsh(q), walsh(k)
        if c.numerics.indexer_fp8:
            q = np.array([a * s for a, s in map(fp8, q)])
            k = np.multiply(*fp8(k))
        self.index_keys.append(k)
        scores = [sum(w[i] * max(q[i] @ k, 0) for i in range(I)) for k in self.index_keys]
        best = sorted(range(len(scores)), key=lambda s: (-scores[s], s))
        return sorted(best[: c.index_topk])

    def mlp(self, x):
        p = self.p
        if "mlp.gate.weight" not in p:
            return self.swiglu(x, "mlp.")
        c = self.c
        s = 1 / (1 + np.exp(-(x @ p["mlp.gate.weight"])))
        choice = s + p["mlp.gate.e_score_correction_bias"]
        size = c.n_routed_experts // c.n_group
        groups = [list(range(g * size, (g + 1) * size)) for g in range(c.n_group)]
        groups.sort(key=lambda g: -sum(sorted(choice[g])[-2:]))
        eligible = [e for group in groups[: c.topk_group] for e in group]
        eligible.sort(key=lambda e: -choice[e])
        chosen = eligible[: c.num_experts_per_tok]
        weight = {e: s[e] / sum(s[j] for j in chosen) * c.routed_scaling_factor for e in chosen}
        out = self.swiglu(x, "mlp.shared_experts.")
        for e in chosen:
            gate, up, down = (p[f"mlp.experts.{n}_proj"][e] for n in ("gate", "up", "down"))
            out = out + weight[e] * ((silu(x @ gate) * (x @ up)) @ down)
        return out

    def swiglu(self, x, name):
        gate, up, down = (self.p[f"{name}{n}_proj.weight"] for n in ("gate", "up", "down"))
        return (silu(x @ gate) * (x @ up)) @ down


def forward(config, layers, embed, norm, head, tokens, *, dense=False):
    """Logits `[T, vocab]` and selections `[layers][T]` of one document."""
    stack = [Layer(config, p) for p in layers]
    logits, selections = [], [[] for _ in layers]
    for position, token in enumerate(tokens):
        h, shared = embed[token], None
        for i, layer in enumerate(stack):
            p = layer.p
            full = dense or config.indexer_type(i) == "full"
            update, selected = layer.attention(
                rms(h, p["input_layernorm.weight"], config.rms_norm_eps),
                position,
                None if full else shared,
                dense,
            )
            shared = selected
            selections[i].append(selected)
            h = h + update
            h = h + layer.mlp(rms(h, p["post_attention_layernorm.weight"], config.rms_norm_eps))
        logits.append(rms(h, norm, config.rms_norm_eps) @ head)
    return np.array(logits), selections
