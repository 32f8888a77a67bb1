"""Transformers and this package side by side on one checkpoint: `python -m convert compare`.

Both run the same tokens from the same weights. Every named difference of numerics is then switched
on alone, from the side that reproduces transformers, so that each line of the table is the effect
of one switch.
"""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from rich.table import Table

import dsa_jax
from convert.huggingface import hf_to_orbax, orbax_to_hf
from dsa_jax.block import Block, residual_dtype
from dsa_jax.config import ModelConfig, Numerics
from dsa_jax.mla import Attention, Mode, Rows
from dsa_jax.plan import layer_plan
from dsa_jax.transformer import Transformer
from pallas_kernels import Selection

Precision = Literal["fp32", "bf16"]
_JAX = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


class Observed(NamedTuple):
    """What a model did with some tokens.

    Attributes:
        logits: fp32.
        hidden: the residual stream, embedding first, then after each layer; fp32.
        selected: the keys each layer attended to; None for a dense model.
    """

    logits: Float[np.ndarray, "B T vocab"]
    hidden: Float[np.ndarray, "layers+1 B T D"]
    selected: Bool[np.ndarray, "layers B T S"] | None


class Difference(NamedTuple):
    """How far one model is from another.

    Attributes:
        logits: greatest difference over the greatest logit.
        hidden: likewise of a layer's hidden states, of the worst layer.
        kl: KL(theirs || ours) of the next token, mean over tokens, in nats.
        keys: share of the selected keys that both chose, over queries that had to choose; 1 for a
            dense model.
    """

    logits: float
    hidden: float
    kl: float
    keys: float


class LayerDifference(NamedTuple):
    """How far single layers are, each given the other model's own input.

    One key or expert chosen otherwise changes everything after it; here nothing is after it.

    Attributes:
        update: root mean square difference of what the layer adds to a token's residual, over that
            of the addition; median over layers and tokens.
        keys: as in `Difference`.
    """

    update: float
    keys: float


def torch_modules() -> tuple[Any, Any]:
    """torch and transformers.

    Raises:
        ModuleNotFoundError: they are not installed; says how to.
    """
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"comparing needs {error.name}, which is not installed: pip install 'dsa-jax[parity]'"
        ) from error


def load_transformers(folder: str | Path, dtype: Precision) -> Any:
    """A checkpoint as transformers builds it."""
    torch, transformers = torch_modules()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
        attn_implementation="sdpa",
        local_files_only=True,
    ).eval()


def observe_transformers(model: Any, tokens: Int[np.ndarray, "B T"], **options: Any) -> Observed:
    """Runs a transformers model.

    Args:
        model: of `load_transformers`.
        tokens: ids.
        options: of its call; `attention_mask` `[B, T]` is taken into account for the selected keys.
    """
    torch, _ = torch_modules()
    hidden: list[np.ndarray] = []
    selected: list[np.ndarray] = []

    def after_layer(_module: Any, _inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        hidden.append(output.float().numpy())

    def after_embedding(_module: Any, _inputs: Any, output: Any) -> None:
        hidden.append(output.float().numpy())

    def after_attention(module: Any, _inputs: Any, _output: Any) -> None:
        if module.indexer is None:  # a shared layer
            selected.append(selected[-1])

    def after_indexer(_module: Any, inputs: Any, output: Any) -> None:
        mask = inputs[3]  # additive, or True where a key is visible
        visible = mask if mask.dtype == torch.bool else mask == 0
        chosen = torch.zeros(visible.shape, dtype=torch.bool).scatter(-1, output.long(), True)
        selected.append((chosen & visible).numpy())

    with torch.no_grad():
        hooks = [model.model.embed_tokens.register_forward_hook(after_embedding)]
        for layer in model.model.layers:
            hooks.append(layer.register_forward_hook(after_layer))
            if hasattr(layer.self_attn, "indexer"):
                hooks.append(layer.self_attn.register_forward_hook(after_attention))
            if getattr(layer.self_attn, "indexer", None) is not None:
                hooks.append(layer.self_attn.indexer.register_forward_hook(after_indexer))
        try:
            logits = model(torch.as_tensor(np.asarray(tokens)), **options).logits.float().numpy()
        finally:
            for hook in hooks:
                hook.remove()
    return Observed(logits, np.stack(hidden), np.stack(selected) if selected else None)


def observe(
    model: Transformer,
    tokens: Int[np.ndarray, "B T"],
    *,
    segment_ids: Int[np.ndarray, "B T"] | None = None,
    attention: Attention | None = None,
) -> Observed:
    """Runs one of our models.

    Args:
        model: any.
        tokens: ids.
        segment_ids: as for a call of the model.
        attention: likewise; None: "masked" with an indexer, for transformers masks dense scores
            too, else "dense".
    """
    mode = _mode(model.config, attention)
    rows = model.rows(jnp.asarray(tokens), segment_ids=_maybe(segment_ids))
    h = jnp.take(model.embed_tokens.weight[...], tokens, axis=0).astype(model.dtype)
    h = h.astype(residual_dtype(model.config, model.dtype))
    hidden, chosen, shared = [np.asarray(h, np.float32)], [], None
    for layer, block in layers(model):
        h, shared = _run_block(block, h, rows, jnp.int32(layer), shared, mode)
        hidden.append(np.asarray(h.astype(model.dtype), np.float32))
        if shared is not None:
            chosen.append(np.asarray(shared.mask(tokens.shape[1])))
    logits = np.asarray(_run_head(model, h))
    return Observed(logits, np.stack(hidden), np.stack(chosen) if chosen else None)


def observe_layers(
    model: Transformer, theirs: Observed, attention: Attention | None = None
) -> LayerDifference:
    """Runs each of our layers on the other model's input; arguments as for `observe`."""
    mode = _mode(model.config, attention)
    shape = theirs.logits.shape[:2]
    rows = model.rows(jnp.zeros(shape, jnp.int32))
    errors, shares, shared = [], [], None
    for layer, block in layers(model):
        before, after = theirs.hidden[layer], theirs.hidden[layer + 1]
        h = jnp.asarray(before, residual_dtype(model.config, model.dtype))
        out, shared = _run_block(block, h, rows, jnp.int32(layer), shared, mode)
        off = np.asarray(out.astype(model.dtype), np.float64) - after
        errors.append(np.sqrt((off**2).mean(-1) / ((after - before) ** 2).mean(-1)))
        if shared is not None and theirs.selected is not None:
            shares.append(_overlap(np.asarray(shared.mask(shape[1])), theirs.selected[layer]))
    return LayerDifference(float(np.median(errors)), float(np.mean(shares)) if shares else 1.0)


def _mode(config: ModelConfig, attention: Attention | None) -> Mode:
    if attention is None:
        attention = "masked" if config.has_indexer else "dense"
    return Mode(attention, select=attention != "dense")


def _maybe(segment_ids: np.ndarray | None) -> Array | None:
    return None if segment_ids is None else jnp.asarray(segment_ids)


@partial(jax.jit, static_argnames=("mode",))
def _run_block(
    block: Block, h: Array, rows: Rows, layer: Array, shared: Selection | None, mode: Mode
) -> tuple[Array, Selection | None]:
    """One layer: layers of a kind share a program, so depth costs no compiling."""
    out = block(h, rows, mode, layer, None, shared)
    return out.h, out.selection


@jax.jit
def _run_head(model: Transformer, h: Array) -> Array:
    return model.unembed(model.norm(h))


def layers(model: Transformer) -> Iterator[tuple[int, Any]]:
    """A model's blocks one by one, with their numbers."""
    for stack, plan in zip(model.stacks, layer_plan(model.config), strict=True):
        for repeat in range(plan.repeats):
            for unit, block in enumerate(stack.blocks):
                one = jax.tree.map(lambda x, row=repeat: x[row], block)
                yield plan.layer(unit, repeat), one


def with_config(model: Transformer, config: ModelConfig) -> Transformer:
    """The same parameters under another config of the same shapes."""
    like = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=model.dtype))
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))


def difference(ours: Observed, theirs: Observed, valid: np.ndarray | None = None) -> Difference:
    """How far ours is from theirs.

    Args:
        ours: from `observe`.
        theirs: from `observe_transformers`.
        valid: `[B, T]`, which tokens count; padding does not.
    """
    valid = np.ones(ours.logits.shape[:2], bool) if valid is None else valid
    a, b = ours.logits[valid].astype(np.float64), theirs.logits[valid].astype(np.float64)
    log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (b, a))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    worst = max(
        _relative(x[valid], y[valid]) for x, y in zip(ours.hidden, theirs.hidden, strict=True)
    )
    keys = 1.0
    if ours.selected is not None and theirs.selected is not None:
        keys = _overlap(ours.selected[:, valid], theirs.selected[:, valid])
    return Difference(_relative(a, b), worst, float(kl.mean()), keys)


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _overlap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Over the queries whose selection is as large as any: the others had no choice."""
    counts = theirs.sum(-1)
    rows = counts == counts.max()
    return float((ours & theirs).sum(-1)[rows].mean() / counts.max())


# What each switch is called in the table, and how it is set on top of transformers' numerics.
_SWITCHES: dict[str, dict[str, Any]] = {
    "fp32 residual sum into the norms": {"round_residual": False},
    "norm weight before the cast": {"round_norm": False},
    "fp32 cos, sin and products": {"round_rotation": False},
    "fp32 silu(gate) * up": {"round_swiglu": False},
    "experts summed in fp32": {"round_experts": False},
    "no epsilon in the gate": {"gate_epsilon": 0.0},
    "Hadamard rotation alone": {"indexer_hadamard": True},
    "FP8 indexer, rotated": {"indexer_hadamard": True, "indexer_fp8": True},
    "FP8 round trip of the latent": {"kv_latent_fp8": True},
}


class Line(NamedTuple):
    """A line of the table."""

    name: str
    switch: str
    layer: LayerDifference
    model: Difference


@dataclass(frozen=True)
class Case:
    """One way to run our side."""

    name: str
    switch: str
    config: ModelConfig
    attention: Attention | None = None


def cases(config: ModelConfig) -> list[Case]:
    """As transformers computes; each difference alone; as DeepSeek does."""
    theirs = config.replace(numerics=Numerics.transformers(), latent_norm_eps=1e-6)
    found = [Case("as transformers", "Numerics.transformers()", theirs)]
    if config.has_indexer:
        name = "keys and values absorbed (MQA)"
        found.append(Case(name, 'attention="sparse"', theirs, "sparse"))
    for name, fields in _SWITCHES.items():
        switch = ", ".join(f"{key}={value}" for key, value in fields.items())
        try:
            numerics = dataclasses.replace(theirs.numerics, **fields)
            found.append(Case(name, switch, theirs.replace(numerics=numerics)))
        except ValueError:  # no indexer, or widths that do not fill blocks
            continue
    if config.rms_norm_eps != 1e-6:
        eps = theirs.replace(latent_norm_eps=None)
        found.append(Case("norms of the latents by the config", "latent_norm_eps=None", eps))
    found.append(Case("all roundings as DeepSeek, no FP8", "Numerics()", _plain(config)))
    try:
        full = _plain(config).replace(numerics=Numerics.deepseek())
        found.append(Case("as DeepSeek", "Numerics.deepseek()", full))
    except ValueError:
        pass
    return found


def _plain(config: ModelConfig) -> ModelConfig:
    return config.replace(numerics=Numerics(), latent_norm_eps=None)


def compare(
    folder: str | Path,
    *,
    dtype: Precision = "bf16",
    length: int | None = None,
    batch: int = 1,
    seed: int = 0,
    scratch: str | Path | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> list[Line]:
    """The table for a local Hugging Face checkpoint.

    Args:
        folder: the checkpoint. FP8 weights are compared dequantised: transformers has no FP8 on a
            CPU.
        dtype: in which both keep weights and compute.
        length: tokens a row; None: three times what the indexer selects, at most 4096.
        batch: rows.
        seed: of the tokens, which are drawn uniformly.
        scratch: where copies of the checkpoint are put meanwhile; None: the system's.
        report: told what is being done.

    Raises:
        ModuleNotFoundError: no torch or no transformers.
        FileNotFoundError, ConvertError: no such checkpoint, or a damaged one.
    """
    torch_modules()
    config = ModelConfig.from_hf(folder)
    if length is None:
        length = min(3 * (config.index_topk or 64), 4096, config.max_position_embeddings)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))
    with tempfile.TemporaryDirectory(dir=scratch) as room:
        report("converting")
        converted = Path(room) / "ours"
        hf_to_orbax(folder, converted, dtype=dtype, mtp=False)
        if config.fp8_weights is not None:
            folder = Path(room) / "dequantised"
            orbax_to_hf(converted, folder)
        report("running transformers")
        theirs = observe_transformers(load_transformers(folder, dtype), tokens)
        model = dsa_jax.load(converted, dtype=_JAX[dtype])
        lines = []
        for case in cases(config.replace(fp8_weights=None, num_nextn_predict_layers=0)):
            report(f"running {case.name}")
            ours = with_config(model, case.config)
            layer = observe_layers(ours, theirs, case.attention)
            whole = difference(observe(ours, tokens, attention=case.attention), theirs)
            lines.append(Line(case.name, case.switch, layer, whole))
    return lines


HEADINGS = ("this package", "by", "layer", "same keys", "logits", "KL", "same keys, whole model")


def cells(line: Line) -> tuple[str, ...]:
    """A line as text, in the order of `HEADINGS`."""
    layer, model = line.layer, line.model
    return (
        line.name,
        line.switch,
        f"{layer.update:.1e}",
        f"{100 * layer.keys:.2f} %",
        f"{model.logits:.1e}",
        f"{model.kl:.1e}",
        f"{100 * model.keys:.2f} %",
    )


def markdown(lines: list[Line]) -> str:
    """The table as it stands in the documentation."""
    rows = [(name, f"`{switch}`", *numbers) for name, switch, *numbers in map(cells, lines)]
    rows = [HEADINGS, ("---", "---", *["---:"] * 5), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def show(lines: list[Line], console: Console) -> None:
    """Prints the table."""
    table = Table(*HEADINGS, title="Against transformers", title_justify="left")
    for line in lines:
        table.add_row(*cells(line))
    console.print(table)
