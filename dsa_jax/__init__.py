"""DeepSeek-V3.2-Exp in JAX: multi-head latent attention with DeepSeek Sparse Attention.

    import dsa_jax
    from flax import nnx

    config = dsa_jax.presets.get("tiny")       # or dsa_jax.ModelConfig.from_hf("path/to/model")
    model = dsa_jax.Transformer(config, rngs=nnx.Rngs(0))
    out = model(tokens)                        # out.logits, out.hidden, out.cache, ...
    dsa_jax.save(model, "model")
    model = dsa_jax.load("model", mesh=None)
    dsa_jax.generate(model, prompts, max_new_tokens=32)

A model is a plain pytree: pass it to `jax.jit` and `jax.grad`, split it with `nnx.split`.

Letters, in annotations, einsum strings and messages: B batch, T queries, S keys, K selected keys,
N attention heads, I indexer heads, D model width, H indexer head width, C latent width, R rotary
width, P nope width, V value width, E experts, F expert width, M rows of tokens, Q query latent
width.
"""

from dsa_jax import presets
from dsa_jax.cache import Cache, init_cache
from dsa_jax.checkpoint import CheckpointError, load, load_config, load_mtp, save
from dsa_jax.config import ModelConfig, Numerics, Yarn
from dsa_jax.counts import param_count
from dsa_jax.generate import Generation, generate
from dsa_jax.mla import AttentionState
from dsa_jax.mtp import MTP
from dsa_jax.sharding import MeshConfig, Rules, make_mesh
from dsa_jax.transformer import Transformer, TransformerOutput

__all__ = [
    "MTP",
    "AttentionState",
    "Cache",
    "CheckpointError",
    "Generation",
    "MeshConfig",
    "ModelConfig",
    "Numerics",
    "Rules",
    "Transformer",
    "TransformerOutput",
    "Yarn",
    "generate",
    "init_cache",
    "load",
    "load_config",
    "load_mtp",
    "make_mesh",
    "param_count",
    "presets",
    "save",
]
