"""`ModelConfig` <-> the `config.json` of a Hugging Face checkpoint.

Both spellings of the rotary settings are read: `rope_theta` + `rope_scaling` (as published) and
`rope_parameters` (transformers 5). What this package cannot build is refused; keys without a
meaning here are kept and written back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsa_jax.config import MODEL_TYPES, Fp8Weights, ModelConfig, Numerics, Yarn

_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}
# Fields that are keys of the same name and value, and must be there.
_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
    *("qk_rope_head_dim", "v_head_dim", "first_k_dense_replace", "moe_intermediate_size"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
)
_INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
# Likewise, but the field's default serves when the key is absent.
_OPTIONAL = (
    *("moe_layer_freq", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("num_nextn_predict_layers", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_SCHEDULE = ("index_topk_freq", "index_skip_topk_offset", "indexer_types")
# The only values this package computes; another one is refused, and these are written back.
_FIXED = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_bias": False,
    "attention_dropout": 0.0,
}
# Of other members of the family; present with another value they would change the result.
_UNSUPPORTED = {
    "mlp_bias": (False, None),
    "index_kpool": (None, 1),
    "index_init_tokens": (None, 0),
    "index_local_tokens": (None, 0),
    "swiglu_limit": (None, 0),
    "rope_interleave": (True, None),
    "attn_logit_softcapping": (None, 0),
}
# Follow from other keys; transformers writes them, we recompute them.
_DERIVED = ("head_dim", "qk_head_dim", "layer_types", "num_key_value_heads", "num_local_experts")
_YARN = tuple(f.name for f in dataclasses.fields(Yarn))
_OURS = "dsa_jax"


def load_json(source: str | Path) -> dict[str, Any]:
    """Reads a `config.json`, or the one in a folder.

    Raises:
        ValueError: the file is empty, not text, not JSON, or not a JSON object.
    """
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"no config at {path}: pass a config.json or the folder that holds one"
        )
    raw = path.read_bytes()
    if not raw.strip():
        raise ValueError(f"{path} is empty; a config.json holds one JSON object")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}); is it a config.json?") from e
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON: {e.msg} at line {e.lineno}") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; a config is an object")
    return value


def read(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """Builds a `ModelConfig` from a `config.json`.

    Args:
        source: a dictionary, a file, or a folder with a `config.json`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a config, an unknown `model_type`, a missing key, or a value that this
            package cannot build.
    """
    hf = dict(source) if isinstance(source, Mapping) else load_json(source)
    model_type = hf.pop("model_type", None)
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"config.json has model_type={model_type!r}; this package builds "
            f"{', '.join(MODEL_TYPES)}"
        )
    ours = dict(hf.pop(_OURS, {}))
    hf.pop("architectures", None)
    _refuse_unsupported(hf)
    has_indexer = MODEL_TYPES[model_type]
    required = _REQUIRED + (_INDEXER if has_indexer else ())
    if missing := [key for key in required if hf.get(key) is None]:
        raise ValueError(
            f"config.json (model_type={model_type!r}) lacks {', '.join(missing)}; "
            "they decide shapes and have no safe default"
        )
    taken = {key: hf.pop(key) for key in required}
    # An indexer that the model type does not have is for `ModelConfig` to refuse, not for `extra`.
    taken |= {key: hf.pop(key) for key in (*_OPTIONAL, *_INDEXER) if key in hf}
    if has_indexer:
        taken |= _schedule(hf)
        interleave = model_type == "glm_moe_dsa"
        taken["indexer_rope_interleave"] = hf.pop("indexer_rope_interleave", interleave)
    taken |= _rope(hf)
    fp8 = _quantization(hf.pop("quantization_config", None))
    _check_derived(hf, taken)
    changed = dict(ours.pop("numerics", {}))
    taken["numerics"] = dataclasses.replace(_numerics(fp8, has_indexer), **changed)
    taken |= ours
    extra = tuple((k, json.dumps(v)) for k, v in hf.items() if k not in _DERIVED)
    return ModelConfig(**taken, model_type=model_type, fp8_weights=fp8, extra=extra)


def write(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` dictionary of a config; `read(write(config)) == config`."""
    c = config
    out: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[c.model_type]],
        "model_type": c.model_type,
        "num_key_value_heads": c.num_attention_heads,
    }
    out |= {key: getattr(c, key) for key in _REQUIRED}
    out |= {key: _plain(getattr(c, key)) for key in _OPTIONAL if key != "pad_token_id"}
    if c.pad_token_id is not None:
        out["pad_token_id"] = c.pad_token_id
    if c.has_indexer:
        out |= {key: getattr(c, key) for key in _INDEXER}
        out |= {k: _plain(getattr(c, k)) for k in _SCHEDULE if getattr(c, k) != _default(k)}
        if c.indexer_rope_interleave or c.model_type == "glm_moe_dsa":
            out["indexer_rope_interleave"] = c.indexer_rope_interleave
    out |= _FIXED
    scaling = c.rope_scaling
    yarn = None if scaling is None else {"type": "yarn"} | dataclasses.asdict(scaling)
    if c.model_type == "glm_moe_dsa":
        kind = {"rope_type": "default"} if yarn is None else {"rope_type": yarn.pop("type")} | yarn
        out["rope_parameters"] = {"rope_theta": c.rope_theta} | kind
    else:
        out |= {"rope_theta": c.rope_theta, "rope_scaling": yarn}
    if c.fp8_weights is not None:
        out["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(c.fp8_weights.weight_block_size),
        }
        if c.fp8_weights.scale_format == "ue8m0":
            out["quantization_config"]["scale_fmt"] = "ue8m0"
    out |= {key: json.loads(text) for key, text in c.extra}
    if ours := _what_hf_cannot_say(c):
        out[_OURS] = ours
    return out


def _default(name: str) -> Any:
    return next(f.default for f in dataclasses.fields(ModelConfig) if f.name == name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _what_hf_cannot_say(c: ModelConfig) -> dict[str, Any]:
    """Our own fields where they differ from what `read` would take from the rest."""
    ours: dict[str, Any] = {}
    standard = _numerics(c.fp8_weights, c.has_indexer)
    numerics = {
        f.name: getattr(c.numerics, f.name)
        for f in dataclasses.fields(Numerics)
        if getattr(c.numerics, f.name) != getattr(standard, f.name)
    }
    if numerics:
        ours["numerics"] = numerics
    for name in ("index_norm_eps", "latent_norm_eps"):
        if getattr(c, name) != _default(name):
            ours[name] = getattr(c, name)
    return ours


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    for key, value in _FIXED.items():
        if hf.pop(key, value) != value:
            raise ValueError(f"config.json: only {key}={value!r} is built here")
    for key, harmless in _UNSUPPORTED.items():
        if key in hf and hf[key] not in harmless:
            raise ValueError(
                f"config.json has {key}={hf[key]!r}, which this package does not build "
                f"(it builds {key}={harmless[0]!r})"
            )


def _schedule(hf: dict[str, Any]) -> dict[str, Any]:
    taken = {key: hf.pop(key) for key in _SCHEDULE if hf.get(key) is not None}
    pattern = hf.pop("index_topk_pattern", None)
    if pattern is not None and "indexer_types" not in taken:
        names = {"F": "full", "S": "shared"}
        taken["indexer_types"] = [names.get(letter, letter) for letter in pattern]
    if "indexer_types" in taken:
        taken["indexer_types"] = tuple(taken["indexer_types"])
    return taken


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    old, new = hf.pop("rope_scaling", None), hf.pop("rope_parameters", None)
    theta = hf.pop("rope_theta", None)
    settings = dict(new or old or {})
    theta = settings.pop("rope_theta", theta)
    if theta is None:
        raise ValueError("config.json lacks rope_theta (top level or in rope_parameters)")
    kinds = {settings.pop(key) for key in ("rope_type", "type") if key in settings}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in ("default", "yarn"):
        raise ValueError(
            f"config.json: rope type {sorted({kind, *kinds})} is not one of 'default' and 'yarn'"
        )
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    if unknown := set(settings) - set(_YARN):
        raise ValueError(f"config.json: YaRN settings {sorted(unknown)} are not built here")
    return {"rope_theta": float(theta), "rope_scaling": Yarn(**settings)}


def _quantization(q: Mapping[str, Any] | None) -> Fp8Weights | None:
    if q is None:
        return None
    wanted = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    for key, value in wanted.items():
        if q.get(key, value) != value:
            raise ValueError(
                f"config.json: quantization_config.{key}={q[key]!r}; only {value!r} is built here. "
                "Convert the weights to bf16 first and remove quantization_config"
            )
    scale_format = "ue8m0" if q.get("scale_fmt") == "ue8m0" else "float"
    block: Any = tuple(q.get("weight_block_size") or (128, 128))
    return Fp8Weights(block, scale_format)


def _numerics(fp8: Fp8Weights | None, has_indexer: bool) -> Numerics:
    # The round trip of the latent came with V3.2's inference code; V3.1 was served without it.
    if fp8 is None:
        return Numerics()
    full = Numerics.deepseek(fp8.scale_format)
    return full if has_indexer else Numerics(scale_format=fp8.scale_format)


def _check_derived(hf: dict[str, Any], taken: dict[str, Any]) -> None:
    heads = taken["num_attention_heads"]
    if hf.get("num_key_value_heads", heads) != heads:
        raise ValueError(
            f"config.json: num_key_value_heads={hf['num_key_value_heads']} must equal "
            f"num_attention_heads={heads}; in MLA every head reads the one shared latent"
        )
    mlp_types = hf.pop("mlp_layer_types", None)
    first, layers = taken["first_k_dense_replace"], taken["num_hidden_layers"]
    expected = ["dense" if i < first else "sparse" for i in range(layers)]
    if mlp_types is not None and list(mlp_types) != expected:
        raise ValueError(
            f"config.json: mlp_layer_types contradicts first_k_dense_replace={first} and "
            f"num_hidden_layers={layers}"
        )
