"""Rows travel to their experts and back: dropless expert parallelism.

Every device holds some of the experts and some of the tokens. Rows (a copy of a token for each of
its experts) are sorted by expert, and so by device; each device sends every other the run of rows
that is for it, computes the rows it received, and sends the results back to where they came from.

How many rows a device receives is known at run time only, but arrays have fixed sizes. So rows
travel in rounds: in each, a device sends any other at most `quota` rows, and there are as many
rounds as the fullest pair of devices needs. One does where routing is balanced; nothing is ever
dropped, whatever the routing, and memory is bounded by the quota.

An `all_to_all` of full quotas moves them. `jax.lax.ragged_all_to_all` would move only the rows that
there are, but is slower where it was measured, and a training step by it hung (`RAGGED`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.tiling import vary_like

# Rows that a device has room for in a round, times those it would get if routing were even. More
# takes memory, less takes rounds. With up to as many devices as this there is one round always.
ROOM = 2.0

# Whether a GPU moves only the rows there are, half of a quota where routing is even. Off: with jax
# 0.11.2 and two H200s in one process the first training step did not return, though all that
# `benchmarks.ragged` tries did; XLA's kernel took longer than an `all_to_all` of full quotas; and
# with a process for each GPU XLA refuses it.
RAGGED = False

Axes = tuple[str, ...]
Apply = Callable[[Any, Array, Array, Array], Array]
"""`(experts, rows, group_sizes, live) -> rows`: this device's experts on rows sorted by expert;
rows after the last group are not `live`: zeros go in and come out."""


class Rows(NamedTuple):
    """Copies of tokens sorted by expert.

    Attributes:
        token: the token of each row.
        row: the row of each token's j-th expert.
        group_sizes: rows of each expert.
    """

    token: Int32[Array, " M*k"]
    row: Int32[Array, "M k"]
    group_sizes: Int32[Array, " E"]


def quota_of(rows: int, devices: int) -> int:
    """Rows that a device may send another in a round."""
    return min(rows, -(-int(ROOM * rows) // devices))


class _Traffic(NamedTuple):
    """Who sends how much to whom; `[P]` one number for each of the P devices.

    Attributes:
        first: where the run of rows for each device starts.
        count: its length.
        back: where the run for this device starts among each device's rows.
        ends: `[P, E/P]`, where the rows for each of this device's experts end in each device's run.
        rounds: how many this group of devices needs.
    """

    first: Int32[Array, " P"]
    count: Int32[Array, " P"]
    back: Int32[Array, " P"]
    ends: Int32[Array, "P E/P"]
    rounds: Int32[Array, ""]


def _traffic(group_sizes: Array, axes: Axes, quota: int) -> _Traffic:
    per_device = group_sizes.reshape(lax.axis_size(axes), -1)
    count = per_device.sum(1)
    first = jnp.cumsum(count) - count
    swap = functools.partial(lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0)
    ends = jnp.cumsum(swap(per_device, tiled=True), axis=1)
    rounds = lax.pmax(-(-count.max() // quota), axes)
    return _Traffic(first, count, swap(first, tiled=True), ends, rounds)


class _Round(NamedTuple):
    """One round of the traffic.

    Attributes:
        send: rows to each device.
        receive: rows from each device.
        first: where the rows to each device start.
        back: where the results go among each device's rows.
        slot: where each device's rows are received: it has `quota` places of its own.
        order: the received places sorted by expert, empty ones last.
        group_sizes: received rows of each expert.
        live: which of the sorted rows there are.
    """

    send: Array
    receive: Array
    first: Array
    back: Array
    slot: Array
    order: Array
    group_sizes: Array
    live: Array


def _round(traffic: _Traffic, number: Array | int, quota: int, rows: int) -> _Round:
    def now(end: Array) -> Array:
        return jnp.clip(end - number * quota, 0, quota)

    ends = now(traffic.ends)
    places = jnp.arange(quota, dtype=jnp.int32)
    expert = (places[:, None] >= ends[:, None, :]).sum(-1)  # [P, quota]; E/P where there is no row
    group_sizes = jnp.diff(ends, axis=1, prepend=0).sum(0)
    live = jnp.arange(expert.size) < group_sizes.sum()
    return _Round(
        send=now(traffic.count),
        receive=ends[:, -1],
        first=jnp.minimum(traffic.first + number * quota, rows),
        back=traffic.back + number * quota,
        slot=jnp.arange(len(ends), dtype=jnp.int32) * quota,
        order=jnp.argsort(expert.reshape(-1), stable=True),
        group_sizes=group_sizes,
        live=live,
    )


def exchange(
    rows: Array,
    into: Array,
    first: Array,
    send: Array,
    there: Array,
    receive: Array,
    *,
    axes: Axes,
    quota: int,
) -> Array:
    """Sends each device a run of `rows`; what comes is written over `into`.

    As `jax.lax.ragged_all_to_all`, which it is on a GPU if `RAGGED` says so.

    Args:
        rows: `[R, ...]`.
        into: `[R', ...]`.
        first, send: of each device, where its run starts and how long it is, at most `quota`.
        there: where the run is to be written on the other side.
        receive: how many rows come from each device.
        axes: of the mesh, over which the devices lie.
        quota: bound on every run.
    """
    ragged = functools.partial(lax.ragged_all_to_all, axis_name=axes)
    padded = functools.partial(_padded_exchange, axes=axes, quota=quota)
    arguments = vary_like((rows, into, first, send, there, receive), (rows, into))
    if not RAGGED:
        return padded(*arguments)
    return lax.platform_dependent(*arguments, cpu=padded, default=ragged)


def _padded_exchange(rows, into, first, send, there, receive, *, axes: Axes, quota: int) -> Array:
    del send  # what is sent too much is not written
    swap = functools.partial(
        lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0, tiled=True
    )
    place = jnp.arange(quota)
    runs = jnp.take(rows, first[:, None] + place, axis=0, mode="clip")
    came = swap(runs).reshape(-1, *rows.shape[1:])
    at = jnp.where(place < receive[:, None], swap(there)[:, None] + place, len(into))
    return into.at[at.reshape(-1)].set(came, mode="drop")


class _Static(NamedTuple):
    apply: Apply
    axes: Axes
    quota: int


def routed(
    apply: Apply,
    experts: Any,
    x: Float[Array, "M D"],
    rows: Rows,
    weights: Float32[Array, "M k"],
    axes: Axes,
) -> Float32[Array, "M D"]:
    """`sum_j weights[m, j] * expert_j(x[m])`, its experts wherever they are.

    To be called inside `shard_map`. Only the arguments are kept for the backward pass: it sends the
    rows again, and with them the gradients of the results.

    Args:
        apply: runs this device's experts.
        experts: their weights, in the compute dtype.
        x: this device's tokens.
        rows: them by expert.
        weights: of each expert's result.
        axes: over which the experts are dealt out.
    """
    experts, (x, weights) = vary_like(experts, x), vary_like((x, weights), experts)
    quota = quota_of(rows.token.size, lax.axis_size(axes))
    return _routed(_Static(apply, axes, quota), experts, x, rows, weights)


def _over_rounds(static: _Static, traffic: _Traffic, step: Callable, state: Any) -> Any:
    rows = jax.tree.leaves(state)[0].shape[0]
    number = functools.partial(_round, traffic, quota=static.quota, rows=rows)
    if static.quota >= rows:  # known beforehand: no loop, so that more can overlap
        return step(number(0), state)
    return lax.fori_loop(0, traffic.rounds, lambda i, state: step(number(i), state), state)


def _here(static: _Static, now: _Round, rows: Array) -> Array:
    """Received rows, sorted by expert; zeros after the last."""
    into = jnp.zeros((len(now.order), *rows.shape[1:]), rows.dtype)
    # Rows of this device lie in the same places on every other.
    there = jnp.full_like(now.slot, lax.axis_index(static.axes) * static.quota)
    came = exchange(
        rows, into, now.first, now.send, there, now.receive,
        axes=static.axes, quota=static.quota,
    )  # fmt: skip
    return came[now.order]


def _home(static: _Static, now: _Round, sorted_rows: Array, into: Array) -> Array:
    """Results back to where their rows came from."""
    rows = jnp.zeros_like(sorted_rows).at[now.order].set(sorted_rows, unique_indices=True)
    return exchange(
        rows, into, now.slot, now.receive, now.back, now.send,
        axes=static.axes, quota=static.quota,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(static: _Static, experts, x, rows: Rows, weights) -> Array:
    traffic = _traffic(rows.group_sizes, static.axes, static.quota)
    copies = x[rows.token]

    def step(now: _Round, results: Array) -> Array:
        y = static.apply(experts, _here(static, now, copies), now.group_sizes, now.live)
        return _home(static, now, y, results)

    results = _over_rounds(static, traffic, step, vary_like(jnp.zeros_like(copies), copies))
    return (results[rows.row].astype(jnp.float32) * weights[..., None]).sum(axis=1)


def _routed_forward(static, experts, x, rows, weights):
    return _routed(static, experts, x, rows, weights), (experts, x, rows, weights)


def _routed_backward(static: _Static, residuals, g):
    experts, x, rows, weights = residuals
    traffic = _traffic(rows.group_sizes, static.axes, static.quota)
    copies, g_copies = x[rows.token], g.astype(x.dtype)[rows.token]
    flat = jnp.zeros(rows.token.shape, jnp.float32)
    w_copies = vary_like(flat, weights).at[rows.row.reshape(-1)].set(weights.reshape(-1))

    def step(now: _Round, state: Any) -> Any:
        dx, dw, total = state
        here = functools.partial(_here, static, now)
        x, g, w = here(copies), here(g_copies).astype(jnp.float32), here(w_copies)
        y, pull = jax.vjp(
            lambda experts, x: static.apply(experts, x, now.group_sizes, now.live), experts, x
        )
        some, dx_here = pull((g * w[:, None]).astype(y.dtype))
        dx_here = jnp.where(now.live[:, None], dx_here, 0)
        dw_here = (g * y.astype(jnp.float32)).sum(axis=1)
        total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, some)
        return _home(static, now, dx_here, dx), _home(static, now, dw_here, dw), total

    zeros = jax.tree.map(lambda w: vary_like(jnp.zeros(w.shape, jnp.float32), w), experts)
    state = (*vary_like((jnp.zeros_like(copies), jnp.zeros_like(w_copies)), copies), zeros)
    dx, dw, total = _over_rounds(static, traffic, step, state)
    dx = dx[rows.row].astype(jnp.float32).sum(axis=1).astype(x.dtype)
    total = jax.tree.map(lambda d, w: d.astype(w.dtype), total, experts)
    return total, dx, None, dw[rows.row]


_routed.defvjp(_routed_forward, _routed_backward)
