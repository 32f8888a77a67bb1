"""The lightning indexer: `lightning_indexer`, and its halves `indexer_scores` and `select_topk`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from pallas_kernels import checks
from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.lightning_indexer import reference, scores_sm90, selection_sm90, topk_sm90
from pallas_kernels.tiling import WORKSPACE_BYTES, vary_like
from pallas_kernels.types import KeyRange, Selection

_SELECT = {"xla": reference.lightning_indexer, "mosaic": selection_sm90.lightning_indexer}
_SCORES = {
    "xla": (reference.indexer_scores, reference.indexer_scores_gradient),
    "mosaic": (scores_sm90.indexer_scores_op, reference.indexer_scores_gradient),
}
_TOPK = {"xla": reference.select_topk, "mosaic": topk_sm90.select_topk}


def lightning_indexer(
    q: Float[Array, "B T I H"],
    k: Float[Array, "B S H"],
    w: Float32[Array, "B T I"],
    ranges: KeyRange,
    *,
    topk: int,
    k_scale: Float32[Array, "B S"] | None = None,
    implementation: Implementation = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Selection:
    """Selects for each query the `topk` visible keys of highest indexer score.

    This is the token selection of DeepSeek Sparse Attention (DeepSeek-V3.2-Exp report, equation 1
    and the top-k that follows it):

        score[t, s] = k_scale[s] * sum_i w[t, i] * relu(q[t, i] . k[s])

    in fp32. The selection is exact and the same in every run: equal scores go to the lower key
    index (0.0 equals -0.0), and NaN loses to every number. While fewer than `topk` keys are
    visible all of them are selected, whatever their score. `[T, S]` scores never exist whole.

    No gradient flows through a selection: the arguments are detached. The indices carry the
    `checkpoint_name` "lightning_indexer.indices" for rematerialisation policies.

    Args:
        q: indexer queries, bf16, fp32 or e4m3.
        k: indexer keys, one per position for all heads; dtype of q.
        w: head weights, of either sign. Whatever scales a head (the softmax scales, the
            quantisation scale of q) is folded in here.
        ranges: the keys each query may see.
        topk: how many keys to select; more than S selects all that are visible.
        k_scale: quantisation scale of each key; None is 1.
        implementation: `"mosaic"`, `"xla"`, or None for the fastest that serves the call.
        workspace_bytes: bound on the scores held at once, and in the XLA implementation on all
            temporary memory, as long as one query, or one block of the kernel's, fits it. Less is
            slower: by 1.5% with 512 MiB for 4096 queries over 131072 keys.

    Returns:
        Selection of K = min(topk, S) slots, ascending, -1 at the end.

    Raises:
        ValueError, TypeError: arguments that contradict each other.
        UnsupportedError: `implementation` cannot serve the call.
    """
    op = "lightning_indexer"
    topk = checks.positive_int(op, "topk", topk)
    _check_scores(op, q, k, w, ranges, k_scale, workspace_bytes)
    select = _SELECT[choose(op, implementation, selection_sm90.unsupported(q, k, topk))]
    arguments = jax.lax.stop_gradient((q, k, w, ranges, k_scale))
    arguments = vary_like(arguments, arguments)
    indices = select(*arguments, topk=topk, workspace_bytes=workspace_bytes)
    return Selection(checkpoint_name(indices, f"{op}.indices"))


def indexer_scores(
    q: Float[Array, "B T I H"],
    k: Float[Array, "B S H"],
    w: Float32[Array, "B T I"],
    ranges: KeyRange,
    *,
    k_scale: Float32[Array, "B S"] | None = None,
    implementation: Implementation = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Float32[Array, "B T S"]:
    """The scores that `lightning_indexer` ranks, for inspection, tests and losses of one's own.

        score[t, s] = k_scale[s] * sum_i w[t, i] * relu(q[t, i] . k[s])

    (DeepSeek-V3.2-Exp report, equation 1), in fp32. Differentiable in q, k, w and k_scale. The
    result has T times S entries: for long sequences use `lightning_indexer`, which never holds
    them.

    Args:
        q: indexer queries, bf16, fp32 or e4m3.
        k: indexer keys; dtype of q.
        w: head weights, of either sign.
        ranges: the keys each query may see.
        k_scale: quantisation scale of each key; None is 1.
        implementation: `"mosaic"`, `"xla"`, or None for the fastest that serves the call.
        workspace_bytes: bound on the temporary memory of the XLA implementation, as long as one
            query fits it.

    Returns:
        Scores, -inf outside the range.

    Raises:
        ValueError, TypeError: arguments that contradict each other.
        UnsupportedError: `implementation` cannot serve the call.
    """
    op = "indexer_scores"
    _check_scores(op, q, k, w, ranges, k_scale, workspace_bytes)
    chosen = choose(op, implementation, scores_sm90.unsupported(q, k))
    config = _ScoresConfig(chosen, workspace_bytes)
    arguments = (q, k, w, ranges, k_scale)
    return _scores(*vary_like(arguments, arguments), config)


def select_topk(
    scores: Float32[Array, "B T S"],
    ranges: KeyRange,
    *,
    topk: int,
    implementation: Implementation = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Selection:
    """Selects the `topk` visible keys of highest score, by the rules of `lightning_indexer`.

    Exact and the same in every run: number before NaN (-inf is a number), then the lower key index
    among equals (0.0 equals -0.0). No gradient flows through it.

    Args:
        scores: any scores; entries outside the range do not count, whatever they hold.
        ranges: the keys each query may see.
        topk: how many keys to select; more than S selects all that are visible.
        implementation: `"mosaic"`, `"xla"`, or None for the fastest that serves the call.
        workspace_bytes: bound on the temporary memory of the XLA implementation, as long as one
            query fits it.

    Returns:
        Selection of K = min(topk, S) slots, ascending, -1 at the end.

    Raises:
        ValueError, TypeError: arguments that contradict each other.
        UnsupportedError: `implementation` cannot serve the call.
    """
    op = "select_topk"
    topk = checks.positive_int(op, "topk", topk)
    checks.positive_int(op, "workspace_bytes", workspace_bytes)
    checks.ranges(op, ranges)
    checks.shapes(op, {"scores": (scores, "B T S"), **checks.range_shapes(ranges)})
    checks.dtype(op, (jnp.float32,), scores=scores)
    unsupported = topk_sm90.unsupported(min(topk, scores.shape[-1]))
    select = _TOPK[choose(op, implementation, unsupported)]
    arguments = jax.lax.stop_gradient((scores, ranges))
    indices = select(*vary_like(arguments, arguments), topk=topk, workspace_bytes=workspace_bytes)
    return Selection(checkpoint_name(indices, f"{op}.indices"))


def _check_scores(op, q, k, w, ranges, k_scale, workspace_bytes):
    checks.positive_int(op, "workspace_bytes", workspace_bytes)
    checks.ranges(op, ranges)
    arrays = {"q": (q, "B T I H"), "k": (k, "B S H"), "w": (w, "B T I")}
    if k_scale is not None:
        arrays["k_scale"] = (k_scale, "B S")
    checks.shapes(op, {**arrays, **checks.range_shapes(ranges)})
    checks.dtype(op, checks.FLOATS_AND_FP8, q=q, k=k)
    checks.dtype(op, (jnp.float32,), w=w)
    if k_scale is not None:
        checks.dtype(op, (jnp.float32,), k_scale=k_scale)


class _ScoresConfig(NamedTuple):
    implementation: str
    workspace_bytes: int


def _run_scores(q, k, w, ranges, k_scale, config: _ScoresConfig):
    forward, _ = _SCORES[config.implementation]
    return forward(q, k, w, ranges, k_scale, workspace_bytes=config.workspace_bytes)


def _scores_forward(q, k, w, ranges, k_scale, config):
    return _run_scores(q, k, w, ranges, k_scale, config), (q, k, w, ranges, k_scale)


def _scores_backward(config, residuals, g):
    _, backward = _SCORES[config.implementation]
    dq, dk, dw, dk_scale = backward(*residuals, g, workspace_bytes=config.workspace_bytes)
    return dq, dk, dw, None, dk_scale


_scores = jax.custom_vjp(_run_scores, nondiff_argnums=(5,))
_scores.defvjp(_scores_forward, _scores_backward)
