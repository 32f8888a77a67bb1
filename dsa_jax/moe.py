"""SwiGLU, and the mixture of experts with sigmoid scores and group-limited routing.

Routing follows DeepSeek-V3 ("noaux_tc"): a bias steers which experts are chosen, the un-biased
scores weigh them. Nothing is dropped: tokens are sorted by expert and multiplied in groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsa_jax import expert_parallel, spread
from dsa_jax.config import ModelConfig
from dsa_jax.expert_parallel import Rows
from dsa_jax.grouped_matmul import grouped_matmul
from dsa_jax.linear import Linear, float_param_dtype
from dsa_jax.norms import round_to
from dsa_jax.quantization import E4M3, round_trip, weight_dequant, weight_quant
from dsa_jax.sharding import Rules, letters_of, path_name
from pallas_kernels.tiling import vary_like


def gate_product(
    gate: Float[Array, "*B F"], up: Float[Array, "*B F"], *, round_first: bool = False
) -> Float[Array, "*B F"]:
    """`silu(gate) * up`, in fp32, rounded once; with `round_first`, `silu(gate)` is rounded too."""
    activated = jax.nn.silu(gate.astype(jnp.float32))
    if round_first:
        activated = round_to(activated, gate.dtype)
    return (activated * up.astype(jnp.float32)).astype(gate.dtype)


class Routing(NamedTuple):
    """Which experts a token goes to, and what their outputs are multiplied by."""

    experts: Int32[Array, "M k"]
    weights: Float32[Array, "M k"]


def route(
    scores: Float32[Array, "M E"], bias: Float32[Array, " E"], config: ModelConfig
) -> Routing:
    """Group-limited top-k routing.

    With c = s + b: a group's score is the sum of its two largest c; the best `topk_group` groups
    are eligible, and of their experts the `num_experts_per_tok` with the largest c are chosen.
    weight_e = s_e / (sum of the chosen s) * routed_scaling_factor (DeepSeek-V3 report, 2.1.2).

    Args:
        scores: sigmoid affinities s.
        bias: correction b of each expert; it decides the choice only and gets no gradient.
        config: for the sizes and switches named above.
    """
    choice = jax.lax.stop_gradient(scores + bias)
    if config.n_group > 1:
        grouped = choice.reshape(-1, config.n_group, config.n_routed_experts // config.n_group)
        group_scores = jax.lax.top_k(grouped, 2)[0].sum(-1)
        _, groups = jax.lax.top_k(group_scores, config.topk_group)
        eligible = jax.nn.one_hot(groups, config.n_group, dtype=bool).any(-2)
        # -inf, not 0: c can be negative, and a masked expert must lose to every eligible one.
        choice = jnp.where(eligible[..., None], grouped, -jnp.inf).reshape(choice.shape)
    _, experts = jax.lax.top_k(choice, config.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + config.numerics.gate_epsilon)
    return Routing(experts, weights * config.routed_scaling_factor)


class SwiGLU(nnx.Module):
    """`down(silu(gate x) * up x)`: the dense layers' MLP, and the shared expert."""

    def __init__(
        self,
        config: ModelConfig,
        width: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ):
        def linear(in_width: int, out_width: int) -> Linear:
            return Linear(
                in_width,
                out_width,
                rngs=rngs,
                std=config.initializer_range,
                dtype=dtype,
                param_dtype=param_dtype,
                fp8=config.fp8_weights,
            )

        self.gate_proj = linear(config.hidden_size, width)
        self.up_proj = linear(config.hidden_size, width)
        self.down_proj = linear(width, config.hidden_size)
        self.round_first = config.numerics.round_swiglu

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Maps the last axis."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gate_product(gate, up, round_first=self.round_first))


class Router(nnx.Module):
    """Affinity of every token to every expert.

    `e_score_correction_bias` is a parameter so that it is saved with the rest, but no gradient
    reaches it: the balance rule of training moves it, and optimisers are to leave it out.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        shape = (config.hidden_size, config.n_routed_experts)
        weight = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.weight = nnx.Param(weight.astype(float_param_dtype(param_dtype)))
        self.e_score_correction_bias = nnx.Param(jnp.zeros(shape[1:], jnp.float32))
        self.config = config

    def __call__(self, x: Float[Array, "M D"]) -> Routing:
        """Chooses experts; fp32 throughout, or near-ties would be decided by rounding."""
        logits = jnp.matmul(
            x.astype(jnp.float32),
            self.weight[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return route(jax.nn.sigmoid(logits), self.e_score_correction_bias[...], self.config)


class Experts(nnx.Module):
    """The routed experts' weights, `[E, in, out]`, and their products over sorted tokens."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ):
        E, D, F = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.dtype = jnp.dtype(dtype)
        self.fp8 = config.fp8_weights if jnp.dtype(param_dtype) == E4M3 else None
        self.round_first = config.numerics.round_swiglu
        shapes = {"gate_proj": (E, D, F), "up_proj": (E, D, F), "down_proj": (E, F, D)}
        for name, shape in shapes.items():
            w = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
            if self.fp8 is None:
                setattr(self, name, nnx.Param(w.astype(float_param_dtype(param_dtype))))
                continue
            q, scale = weight_quant(w, self.fp8.tile, self.fp8.scale_format)
            setattr(self, name, nnx.Param(q))
            setattr(self, f"{name}_scale", nnx.Param(scale))

    def _matmul(self, name: str, x: Array, group_sizes: Array) -> Array:
        w = getattr(self, name)[...]
        if self.fp8 is not None:
            x = round_trip(x, self.fp8.tile[0], self.fp8.scale_format)
            scale = getattr(self, f"{name}_scale")[...]
            w = weight_dequant(w, scale, self.fp8.tile, self.dtype)
        return grouped_matmul(x, w.astype(self.dtype), group_sizes)

    def __call__(
        self,
        x: Float[Array, "M D"],
        group_sizes: Int32[Array, " E"],
        live: Bool[Array, " M"] | None = None,
    ) -> Float[Array, "M D"]:
        """SwiGLU of every row by its expert; rows sorted by expert.

        Args:
            x: the rows.
            group_sizes: of each expert.
            live: False for the rows after the last expert's, if there are any: zeros come out.
        """

        def product(name: str, x: Array) -> Array:
            out = self._matmul(name, x, group_sizes)
            return out if live is None else jnp.where(live[:, None], out, 0)

        gate, up = product("gate_proj", x), product("up_proj", x)
        return product("down_proj", gate_product(gate, up, round_first=self.round_first))

    def whole(self, axes: tuple[str, ...]) -> Experts:
        """The same experts with the model width whole, in the compute dtype: inside `shard_map`.

        Args:
            axes: over which the model width is cut.
        """

        def leaf(path: Any, w: Array) -> Array:
            letters = letters_of("experts/" + path_name(path)).replace(" ", "")
            if w.dtype in (jnp.float32, jnp.bfloat16) and "_scale" not in path_name(path):
                w = w.astype(self.dtype)
            return _joined(w, axes, letters.index("X")) if axes and "X" in letters else w

        return jax.tree_util.tree_map_with_path(leaf, self)


def _joined(w: Array, axes: tuple[str, ...], dimension: int) -> Array:
    """`lax.all_gather(w, axes, axis=dimension, tiled=True)`, gathered in front and then moved.

    XLA wants the gathered dimension outermost in memory. If that is not the first, it lays the
    stacked weights of all layers out that way, outside the loop over layers: a second copy of all
    experts, in fp32. So only what was gathered, one layer's, changes its layout.
    """
    parts = jnp.moveaxis(lax.all_gather(w, axes), 0, dimension)
    return lax.collapse(parts, dimension, dimension + 2)


def dispatch(routing: Routing, experts: int) -> Rows:
    """How to sort copies of tokens by expert, and back."""
    tokens, k = routing.experts.shape
    flat = routing.experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    group_sizes = jnp.zeros((experts,), jnp.int32).at[flat].add(1)
    return Rows(order // k, row.reshape(tokens, k), group_sizes)


# Every copy of a token has one row, and every row one token. So what one direction gathers the
# other gathers too; left to itself, differentiation would add into place with atomics, in bf16.


@jax.custom_vjp
def copies(x: Float[Array, "M D"], rows: Rows) -> Float[Array, "M*k D"]:
    """The token of every row."""
    return x[rows.token]


def _copies_backward(rows: Rows, g: Array) -> tuple[Array, None]:
    return g[rows.row].astype(jnp.float32).sum(axis=1).astype(g.dtype), None


copies.defvjp(lambda x, rows: (copies(x, rows), rows), _copies_backward)


@jax.custom_vjp
def combined(
    y: Float[Array, "M*k D"], weights: Float32[Array, "M k"], rows: Rows
) -> Float32[Array, "M D"]:
    """`sum_j weights[m, j] * y[row[m, j]]`: what a token's experts say."""
    return (y[rows.row].astype(jnp.float32) * weights[..., None]).sum(axis=1)


def _combined_backward(residuals: Any, g: Array) -> tuple[Array, Array, None]:
    y, weights, rows = residuals
    by_row = vary_like(jnp.zeros(rows.token.shape, jnp.float32), weights)
    by_row = by_row.at[rows.row.reshape(-1)].set(weights.reshape(-1), unique_indices=True)
    dy = g[rows.token] * by_row[:, None]
    dweights = (y[rows.row].astype(jnp.float32) * g[:, None]).sum(axis=-1)
    return dy.astype(y.dtype), dweights, None


combined.defvjp(lambda *x: (combined(*x), x), _combined_backward)


class MoE(nnx.Module):
    """Routed experts and the shared one."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rules: Rules | None = None,
    ):
        self.config = config
        self.rules = rules or Rules()
        self.gate = Router(config, rngs=rngs, param_dtype=param_dtype)
        self.experts = Experts(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = (
            SwiGLU(config, width, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
            if width
            else None
        )

    def __call__(
        self, x: Float[Array, "B T D"], counted: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float32[Array, " E"]]:
        """`sum_e weight_e expert_e(x) + shared(x)`, summed in fp32 and rounded once.

        Args:
            x: normalised input.
            counted: which tokens count in the load; padding does not.

        Returns:
            The output, and how many counted tokens each expert got.
        """
        letters = jax.tree_util.tree_map_with_path(
            lambda path, _: letters_of("experts/" + path_name(path)), self.experts
        )
        gate = jax.tree.map(lambda w: "_" * w.ndim, self.gate)
        run = spread.per_device(
            self._routed(), self.rules, (gate, letters, "B T _", "B T"), ("B T _", "_")
        )
        out, load = run(self.gate, self.experts, x, counted)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x).astype(jnp.float32)
        return out.astype(x.dtype), load

    def _routed(self) -> Callable:
        """The routed experts' part of a call, of a device's own tokens and experts."""
        axes_of = functools.partial(spread.axes_of, self.rules)
        dealt, cut, split = axes_of("E"), axes_of("X"), axes_of("F")
        tokens = axes_of("B") + axes_of("T")
        _check_axes(self.rules, dealt, tokens)

        def run(gate: Router, experts: Experts, x: Array, counted: Array) -> tuple[Array, Array]:
            flat = x.reshape(-1, x.shape[-1])
            routing = gate(flat)
            rows = dispatch(routing, self.config.n_routed_experts)
            experts = vary_like(experts, x).whole(cut)
            if dealt:
                out = expert_parallel.routed(_apply, experts, flat, rows, routing.weights, dealt)
            else:
                y = experts(copies(flat, rows), rows.group_sizes)
                out = combined(y, vary_like(routing.weights, y), rows)
            if split:
                out = lax.psum(out, split)
            if self.config.numerics.round_experts:
                out = round_to(out, x.dtype)
            load = jnp.zeros((self.config.n_routed_experts,), jnp.float32)
            load = load.at[routing.experts].add(counted.reshape(-1, 1).astype(jnp.float32))
            return out.reshape(x.shape), lax.psum(load, tokens) if tokens else load

        return run


def _apply(experts: Experts, x: Array, group_sizes: Array, live: Array) -> Array:
    return experts(x, group_sizes, live)


def _check_axes(rules: Rules, dealt: tuple[str, ...], tokens: tuple[str, ...]) -> None:
    if strange := [axis for axis in dealt if axis not in tokens]:
        raise ValueError(
            f"Rules.E={rules.E!r}: axis {strange[0]!r} does not split tokens (Rules.B={rules.B!r}, "
            f"Rules.T={rules.T!r}), so nothing could travel along it; deal experts out over axes "
            "that do"
        )
