"""The model: embedding, stacks of blocks, final norm, language-model head.

Used as a plain pytree: `jax.jit`, `jax.grad` and `nnx.split` all take it; a call changes nothing
and returns everything it makes. Attribute names are those of the published checkpoint, weights are
`[in, out]`. Layers are stacked as `dsa_jax.plan.layer_plan` says: the parameters of layer
`plan.layer(u, r)` are row r of every leaf of `model.stacks[s].blocks[u]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from dsa_jax import spread
from dsa_jax.block import Block, residual_dtype
from dsa_jax.cache import Cache, check_room
from dsa_jax.config import ModelConfig
from dsa_jax.indexer_loss import GRADIENT_NAME
from dsa_jax.linear import float_param_dtype, wide_product
from dsa_jax.mla import SELECTION_NAME, Attention, AttentionState, IndexerLoss, Mode, Rows
from dsa_jax.norms import RMSNorm
from dsa_jax.plan import StackPlan, layer_plan
from dsa_jax.rope import Rotation, rotation
from dsa_jax.sharding import Rules
from pallas_kernels import KeyRange, Selection

Selector = Callable[[AttentionState], Selection]
Probe = Callable[[AttentionState], Any]

_policies = jax.checkpoint_policies
# What the backward pass finds saved and does not recompute. The indexer's gradient always is: it is
# as large as the indexer, and recomputing it would mean the loss twice.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    # Only the layer's input.
    "full": _policies.save_only_these_names(GRADIENT_NAME),
    # Also the selected keys (4 bytes each), so that keys are scored once.
    "selection": _policies.save_only_these_names(GRADIENT_NAME, SELECTION_NAME),
    # Also every product with a weight.
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(GRADIENT_NAME, SELECTION_NAME),
    ),
}


class TransformerOutput(NamedTuple):
    """Everything a forward pass makes; what was not asked for is None.

    Attributes:
        logits: fp32. Under `jit`, unread logits cost nothing.
        hidden: what the head reads: the final norm's output.
        cache: the past with the new tokens.
        kl: the indexer's loss of each layer, a mean over the rows that see a key; 0 in layers that
            share another's selection.
        selection: the keys attended to, `[layers, B, T, K]`.
        router_load: tokens (padding aside) each expert of each MoE layer got.
        probe: what the probe returned, with a leading axis over layers.
    """

    logits: Float32[Array, "B T vocab"]
    hidden: Float[Array, "B T D"]
    cache: Cache | None
    kl: Float32[Array, " layers"] | None
    selection: Selection | None
    router_load: Float32[Array, "moe_layers E"] | None
    probe: Any


class Embedding(nnx.Module):
    """A table of rows, or of columns: the token embedding and the head."""

    def __init__(self, shape: tuple[int, int], *, key: Array, std: float, param_dtype: DTypeLike):
        weight = std * jax.random.normal(key, shape, jnp.float32)
        self.weight = nnx.Param(weight.astype(float_param_dtype(param_dtype)))


class Stack(nnx.Module):
    """Layers that are scanned together: a unit of blocks, each with a leading axis of repeats."""

    def __init__(
        self,
        config: ModelConfig,
        plan: StackPlan,
        *,
        keys: Array,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rules: Rules | None = None,
    ):
        def make(unit: int) -> Block:
            def one(key: Array) -> Block:
                # The indexer has its own stream: with and without one, the rest starts equal.
                rngs = nnx.Rngs(params=key, indexer=jax.random.fold_in(key, 1))
                kind = plan.kinds[unit]
                options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
                return Block(config, kind, rngs=rngs, rules=rules, **options)

            layers = [plan.layer(unit, repeat) for repeat in range(plan.repeats)]
            return jax.vmap(one)(keys[jnp.array(layers)])

        self.blocks = nnx.List([make(unit) for unit in range(len(plan.kinds))])


class Transformer(nnx.Module):
    """A decoder of the DeepSeek-V3 family, dense or with DeepSeek Sparse Attention.

    Args:
        config: the architecture.
        rngs: for fresh parameters; layer i gets the same ones however layers are grouped.
        dtype: in which activations are computed. Norms, router, softmax, indexer scores, the
            residual sum and the logits are fp32 whatever this is.
        param_dtype: in which parameters are kept: fp32 masters for training, bf16, or
            float8_e4m3fn to keep an FP8 checkpoint's weights as they are (not trainable).
        scan: whether stacks are scanned or unrolled; the result is the same, unrolled is easier to
            debug.
        remat: a key of `REMAT_POLICIES`: what the backward pass recomputes.
        rules: how parameters and computation spread over the mesh of `jax.set_mesh`, if one is set
            and has more than one device; the result is the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        scan: bool = True,
        remat: str = "none",
        rules: Rules | None = None,
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(f"Transformer: remat={remat!r} is not in {tuple(REMAT_POLICIES)}")
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.scan = scan
        self.remat = remat
        self.rules = rules or Rules()
        layers = config.num_hidden_layers
        root = rngs.params()
        keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.arange(layers + 2))
        table = {"std": config.initializer_range, "param_dtype": param_dtype}
        D, vocab = config.hidden_size, config.vocab_size
        self.embed_tokens = Embedding((vocab, D), key=keys[layers], **table)
        self.stacks = nnx.List(
            [
                Stack(config, plan, keys=keys, dtype=dtype, param_dtype=param_dtype, rules=rules)
                for plan in layer_plan(config)
            ]
        )
        self.norm = RMSNorm(
            D,
            eps=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=float_param_dtype(param_dtype),
            round_first=config.numerics.round_norm,
        )
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Embedding((D, vocab), key=keys[layers + 1], **table)
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        attention: Attention = "sparse",
        indexer_loss: IndexerLoss | None = None,
        selector: Selector | None = None,
        probe: Probe | None = None,
        return_selection: bool = False,
    ) -> TransformerOutput:
        """Runs the model.

        Args:
            tokens: ids.
            positions: of the tokens in their documents; by default they count from 0 in every
                document, or on from the cache's lengths.
            segment_ids: equal ids side by side are one document, 0 is padding. With a cache: which
                of the tokens are new (padding, at the end of a row, is not kept).
            cache: the past; keys are then everything in it and the new tokens.
            attention: "sparse" over the selected keys, "dense" over all, "masked" over the selected
                ones by masking dense scores.
            indexer_loss: None; "dense", over all visible keys, with dense attention; "sparse", over
                the selected ones, with the other two.
            selector: replaces the indexer's choice; also lets a dense model run sparse.
            probe: evaluated in every layer; what it returns must have one structure throughout.
                With a sequence cut over devices its tokens are in the devices' order, so there it
                must have an attribute `any_order = True` to say that this does not matter.
            return_selection: whether to return the selected keys.

        Raises:
            ValueError: arguments that do not fit each other, the config, or the cache.
        """
        select = attention != "dense" or probe is not None or return_selection
        select = select and (self.config.has_indexer or selector is not None)
        mode = Mode(attention, indexer_loss, selector, probe, select)
        self._check(tokens, positions, segment_ids, cache, mode, return_selection)
        rows = self.rows(tokens, positions, segment_ids, cache)
        table = self.embed_tokens.weight[...]
        h = spread.lookup(table, spread.in_zigzag(tokens, self.rules), self.rules, self.dtype)
        h = h.astype(residual_dtype(self.config, self.dtype))
        h, caches, made = self._layers(h, rows, mode, cache)
        hidden = spread.in_natural_order(self.norm(h), self.rules)
        if cache is not None:
            count = rows.valid.sum(axis=1, dtype=jnp.int32)
            cache = Cache(cache.lengths + count, caches)
        return TransformerOutput(
            logits=self.unembed(hidden),
            hidden=hidden,
            cache=cache,
            kl=made["kl"],
            selection=self._selection(made["selection"]) if return_selection else None,
            router_load=made["load"],
            probe=made["probe"],
        )

    def _selection(self, made: Selection) -> Selection:
        """All layers' selected keys, queries in natural order."""
        unstacked = [spread.in_natural_order(layer, self.rules) for layer in made.indices]
        return Selection(jnp.stack(unstacked))

    def head(self) -> Float[Array, "D vocab"]:
        """The head's weight: its own, or the embedding's."""
        if self.lm_head is None:
            return self.embed_tokens.weight[...].T
        return self.lm_head.weight[...]

    def unembed(
        self, hidden: Float[Array, "*B D"], weight: Float[Array, "D vocab"] | None = None
    ) -> Float32[Array, "*B vocab"]:
        """Logits of final hidden states, for losses and samplers that take them in pieces.

        Products of compute-dtype values summed in fp32, which for bf16 is what an fp32 head gives.
        """
        weight = self.head() if weight is None else weight
        return wide_product(hidden.astype(self.dtype), weight)

    def _check(
        self,
        tokens: Array,
        positions: Array | None,
        segment_ids: Array | None,
        cache: Cache | None,
        mode: Mode,
        return_selection: bool,
    ) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be integers [B, T], not {tokens.dtype}{list(tokens.shape)}"
            )
        for name, value in (("positions", positions), ("segment_ids", segment_ids)):
            if value is not None and value.shape != tokens.shape:
                raise ValueError(
                    f"{name} has shape {list(value.shape)}, tokens {list(tokens.shape)}; "
                    "they must be equal"
                )
        _check_mode(self.config, mode, return_selection)
        spread.check_batch(tokens.shape, self.rules)
        if spread.order_of(self.rules) > 1:
            _check_context(mode, cache)
        if cache is not None:
            if mode.indexer_loss is not None:
                raise ValueError(
                    f"indexer_loss={mode.indexer_loss!r} needs a whole sequence; it has no meaning "
                    "with a cache"
                )
            check_room(cache, *tokens.shape)

    def rows(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> Rows:
        """Where the tokens stand, for running blocks one by one; arguments as for a call.

        Rows are in the order in which the devices of the mesh hold tokens, see `dsa_jax.spread`;
        key ranges count keys in natural order.
        """
        batch, queries = tokens.shape
        valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
        lengths = None
        if cache is not None:
            lengths = cache.lengths
            ranges = KeyRange.causal(batch, queries, offset=lengths)
            ranges = KeyRange(ranges.start, jnp.where(valid, ranges.end, 0))
            first = -lengths[:, None]  # the new tokens' index 0 is position `lengths`
        elif segment_ids is not None:
            ranges = KeyRange.packed(segment_ids)
            first = ranges.start
        else:
            ranges = KeyRange.causal(batch, queries)
            first = 0
        if positions is None:
            positions = jnp.arange(queries, dtype=jnp.int32)[None] - first
            positions = jnp.broadcast_to(positions, tokens.shape)
        positions, ranges, valid = spread.in_zigzag((positions, ranges, valid), self.rules)
        turn = rotation(self.config, positions)
        if self.config.numerics.round_rotation:
            turn = Rotation(*(x.astype(self.dtype) for x in turn))
        return Rows(turn, ranges, valid, lengths)

    def _layers(
        self, h: Array, rows: Rows, mode: Mode, cache: Cache | None
    ) -> tuple[Array, Any, dict[str, Any]]:
        """All stacks in turn.

        Returns:
            The residual sum, the caches as `Cache.stacks`, and what was made in every layer.
        """
        plans = layer_plan(self.config)
        shares = mode.select and any(not kind.has_indexer for plan in plans for kind in plan.kinds)
        shares = shares and self.config.has_indexer
        shared: Selection | None = None
        caches, made = [], []
        for number, plan in enumerate(plans):
            past = None if cache is None else cache.stacks[number]
            step = _unit_step(rows, mode, shares)
            blocks = tuple(self.stacks[number].blocks)
            layers = plan.first + jnp.arange(plan.repeats * len(plan.kinds), dtype=jnp.int32)
            xs = (blocks, past, layers.reshape(plan.repeats, -1))
            if shares and shared is None:
                # The first layer is a full one and reads nothing; only the shape matters.
                shape = jax.eval_shape(step, (h, None), jax.tree.map(lambda x: x[0], xs))[0][1]
                shared = jax.tree.map(lambda s: jnp.full(s.shape, -1, s.dtype), shape)
            if self.remat != "none":
                # Inside a scan, common-subexpression elimination cannot undo the recomputation.
                policy = REMAT_POLICIES[self.remat]
                step = jax.checkpoint(step, policy=policy, prevent_cse=not self.scan)
            run = jax.lax.scan if self.scan else _unrolled_scan
            (h, shared), (new, layer_outputs) = run(step, (h, shared), xs)
            caches.append(new)
            made.append(layer_outputs)
        return h, tuple(caches), _in_layer_order(made)


def _unit_step(rows: Rows, mode: Mode, shares: bool) -> Callable:
    """One repeat of a stack, as a scan's body."""

    def step(carry: tuple[Array, Selection | None], xs: Any) -> tuple[Any, Any]:
        h, shared = carry
        blocks, past, layers = xs
        caches, outputs = [], []
        for unit, block in enumerate(blocks):
            out = block(h, rows, mode, layers[unit], None if past is None else past[unit], shared)
            h = out.h
            shared = out.selection if shares else None
            caches.append(out.cache)
            outputs.append(
                {"kl": out.kl, "load": out.load, "probe": out.probe, "selection": out.selection}
            )
        return (h, shared), (tuple(caches), outputs)

    return step


def _unrolled_scan(step: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` as a Python loop."""
    length = len(jax.tree.leaves(xs)[0])
    ys = []
    for i in range(length):
        carry, y = step(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def _in_layer_order(stacks: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Per stack and unit `[repeats, ...]` -> per quantity `[layers, ...]`, where it was made."""
    made: dict[str, Any] = {}
    for name in stacks[0][0]:
        parts = []
        for units in stacks:
            present = [unit[name] for unit in units if unit[name] is not None]
            if present:
                joined = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *present)
                parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), joined))
        made[name] = jax.tree.map(lambda *x: jnp.concatenate(x), *parts) if parts else None
    return made


def _check_context(mode: Mode, cache: Cache | None) -> None:
    """What needs all tokens of a sequence on one device."""
    for name, given in (
        ("cache", cache is not None),
        ("selector", mode.selector is not None),
        ("probe", mode.probe is not None and not getattr(mode.probe, "any_order", False)),
        ("attention='masked'", mode.attention == "masked"),
    ):
        if given:
            raise ValueError(
                f"{name} does not run with a sequence cut over devices; set mesh.context=1 and "
                "mesh.tensor=1"
            )


def _check_mode(config: ModelConfig, mode: Mode, return_selection: bool) -> None:
    if mode.attention not in ("dense", "sparse", "masked"):
        raise ValueError(f"attention={mode.attention!r} is not 'dense', 'sparse' or 'masked'")
    if mode.indexer_loss not in (None, "dense", "sparse"):
        raise ValueError(f"indexer_loss={mode.indexer_loss!r} is not None, 'dense' or 'sparse'")
    chooses = config.has_indexer or mode.selector is not None
    if not chooses and (mode.attention != "dense" or return_selection):
        raise ValueError(
            f"attention={mode.attention!r}, return_selection={return_selection} need keys to be "
            "chosen, but the config has no indexer (index_topk=None): use attention='dense', or "
            "pass a selector"
        )
    if mode.indexer_loss is None:
        return
    if not config.has_indexer:
        raise ValueError(
            f"indexer_loss={mode.indexer_loss!r} but the config has no indexer (index_topk=None)"
        )
    if (mode.indexer_loss == "dense") != (mode.attention == "dense"):
        raise ValueError(
            f"indexer_loss={mode.indexer_loss!r} does not go with attention={mode.attention!r}: "
            "the dense loss compares with dense attention, the sparse loss with attention over "
            "the selected keys"
        )
