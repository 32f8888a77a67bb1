"""A small FP8 layer with every split uneven, its weights quantised by the oracle."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsa_jax import presets
from dsa_jax.cache import init_cache
from dsa_jax.config import Fp8Weights, ModelConfig
from dsa_jax.mla import MLA, Mode, Rows
from dsa_jax.moe import MoE
from dsa_jax.rope import rotation
from pallas_kernels import KeyRange
from tests.oracle import deepseek

# Compiling takes longer than running: LLVM need not try hard.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

LENGTH = 48  # six times index_topk
FIRST = 70  # past the original context of 64, where YaRN's divided pairs differ


def config() -> ModelConfig:
    """`tiny-fp8` with FP8 weights: every inner width fills blocks of 128, output widths do not."""
    return presets.get("tiny-fp8").replace(
        v_head_dim=32, moe_intermediate_size=128, fp8_weights=Fp8Weights(scale_format="ue8m0")
    )


def filled(module: Any, seed: int) -> Any:
    """Lively weights: scores far from uniform, norms off 1, biases off 0, scales powers of two."""
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree_util.tree_flatten_with_path(module)
    values: dict[str, Any] = {}
    for path, x in leaves:
        name = ".".join(str(k.name) for k in path[:-1])
        noise = rng.standard_normal(x.shape)
        if "scale" in name:
            continue
        if "norm" in name:
            value = 0.3 * noise + (0 if "bias" in name else 1)
        elif "e_score_correction_bias" in name:
            value = 0.2 * noise - 1.0  # sigmoid + bias is mostly below zero
        else:
            value = 1.2 * noise * x.shape[-2] ** -0.5
        if x.dtype == jnp.float8_e4m3fn:
            beside = name.replace(".weight", ".scale") if ".weight" in name else f"{name}_scale"
            value, scale = deepseek.weight_quant(value)
            values[beside] = jnp.asarray(scale, jnp.float32)
        values[name] = jnp.asarray(value, x.dtype)
    names = (".".join(str(k.name) for k in path[:-1]) for path, _ in leaves)
    return jax.tree.unflatten(structure, [values[name] for name in names])


def by_name(module: Any, prefix: str) -> dict[str, np.ndarray]:
    """Exact float64 copies of the parameters, as the oracle names them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(module)
    return {
        prefix + ".".join(str(k.name) for k in path[:-1]): np.asarray(x, np.float64)
        for path, x in leaves
    }


class Setting:
    """A layer's attention and experts, in bf16 with FP8 weights, and what enters them."""

    def __init__(self) -> None:
        self.config = c = config()
        options: dict[str, Any] = {
            "dtype": jnp.bfloat16,
            "param_dtype": jnp.float8_e4m3fn,
        }
        self.mla = filled(nnx.eval_shape(lambda: MLA(c, True, rngs=nnx.Rngs(0), **options)), 1)
        self.moe = filled(nnx.eval_shape(lambda: MoE(c, rngs=nnx.Rngs(0), **options)), 2)
        self.params = by_name(self.mla, "self_attn.") | by_name(self.moe, "mlp.")
        self.positions = np.arange(FIRST, FIRST + LENGTH)
        noise = np.random.default_rng(3).standard_normal((LENGTH, c.hidden_size))
        self.x = deepseek.bf16(noise)
        self.turn = deepseek.turns(c, self.positions)

    @functools.cached_property
    def projected(self) -> deepseek.Projected:
        return deepseek.project(self.config, self.params, self.x, self.turn)

    @property
    def jax_x(self) -> jax.Array:
        return jnp.asarray(self.x, jnp.bfloat16)[None]

    @property
    def rows(self) -> Rows:
        turn = rotation(self.config, jnp.asarray(self.positions)[None])
        ones = jnp.ones((1, LENGTH), bool)
        return Rows(turn, KeyRange.causal(1, LENGTH), ones, None)

    def attend(self, attention: str) -> Any:
        """The package's attention; whatever is patched now is traced now."""
        mode = Mode(attention)  # type: ignore[arg-type]
        run = jit(lambda mla, x: mla(x, self.rows, mode, jnp.int32(0)))
        return run(self.mla, self.jax_x)

    def route(self) -> Any:
        return jit(lambda gate, x: gate(x))(self.moe.gate, self.jax_x[0])

    def prefill_then_decode(self, prompt: int) -> tuple[list[set[int]], np.ndarray]:
        """Keys and outputs of the tokens after the prompt, each read alone."""
        c, x, rows = self.config, self.jax_x, self.rows
        empty = jax.tree.map(lambda a: a[0], init_cache(c, 1, LENGTH).stacks[0][0])

        def run(attention: str, mla: Any, x: Any, turn: Any, length: Any, cache: Any) -> Any:
            T = x.shape[1]
            ranges = KeyRange.causal(1, T, offset=length)
            now = Rows(turn, ranges, jnp.ones((1, T), bool), length)
            mode = Mode(attention)  # type: ignore[arg-type]
            return mla(x, now, mode, jnp.int32(0), cache)

        prefill, decode = (jit(functools.partial(run, a)) for a in ("masked", "sparse"))
        part = jax.tree.map(lambda a: a[:, :prompt], (x, rows.turn))
        cache = prefill(self.mla, *part, jnp.array([0]), empty).cache
        keys, outs = [], []
        for t in range(prompt, LENGTH):
            part = jax.tree.map(lambda a, t=t: a[:, t : t + 1], (x, rows.turn))
            out = decode(self.mla, *part, jnp.array([t]), cache)
            cache = out.cache
            keys.append({int(s) for s in np.asarray(out.selection.indices[0, 0]) if s >= 0})
            outs.append(np.asarray(out.out[0, 0], np.float64))
        return keys, np.stack(outs)


@functools.cache
def setting() -> Setting:
    return Setting()
