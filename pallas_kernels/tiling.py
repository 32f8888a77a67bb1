"""Blocks of work that keep the plain XLA ops inside a byte budget.

An op whose result is `[B, T, ...]` needs `[T, S]`-like intermediates. It computes them for one
block of queries after another, so that what is alive at once does not grow with T. Blocks are
slices of the arrays where they lie: nothing is padded, transposed or copied whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WORKSPACE_BYTES = 512 * 2**20

# Below this many queries a block's matmuls are too thin to be worth keeping all rows and heads
# together; rows of the batch, then heads, are split first.
_FEW_QUERIES = 64


class Plan(NamedTuple):
    """How many batch rows, heads and queries are computed at once."""

    batch: int
    heads: int
    queries: int


def plan(
    *,
    batch: int,
    queries: int,
    heads: int = 1,
    fixed: Callable[[int], int],
    per_query: Callable[[int], int],
    workspace_bytes: int,
) -> Plan:
    """The largest blocks that fit the budget; at least one query of one head of one row.

    Args:
        batch: B.
        queries: T.
        heads: N, where heads can be computed apart; else 1.
        fixed: bytes that a batch row needs whatever the queries, given the heads of a block.
        per_query: bytes that a query of a batch row needs, given the heads of a block.
        workspace_bytes: the budget.
    """
    splits = [(batch, heads)] + [(1, n) for n in range(heads, 0, -1) if heads % n == 0]
    for rows, some_heads in splits:
        left = workspace_bytes - rows * fixed(some_heads)
        fit = left // (rows * per_query(some_heads))
        if fit >= min(queries, _FEW_QUERIES):
            break
    return Plan(rows, some_heads, max(1, min(fit, queries)))


class Block(NamedTuple):
    """Which block is being computed.

    Attributes:
        row: first batch row of the block.
        fresh: `[queries]`, which of its queries no earlier block had.
    """

    row: jax.Array | int
    fresh: jax.Array


def over_blocks(
    fn: Callable,
    plan: Plan,
    keys: Any,
    queries: Any,
    *,
    heads: int | None = None,
    start: Callable = lambda keys: (),
    finish: Callable = lambda sums: sums,
) -> Any:
    """Runs `fn` over blocks of rows, heads and queries and puts its results together.

    The last block of queries is shifted back to end with the axis, so it may overlap the one
    before: what it computes for queries that are not `fresh` is thrown away, and `fn` must keep
    them out of the sums.

    Args:
        fn: `(sums, keys, queries, Block) -> (sums, outputs)` on one block.
        plan: sizes of the blocks.
        keys: pytree of arrays `[B, S, ...]`; `fn` gets the block's rows and heads.
        queries: pytree of arrays `[B, T, ...]`; `fn` gets the block's rows, heads and queries.
        heads: N, if heads are computed apart: then every array of three axes or more has them
            third. None if heads stay together.
        start: the sums before the first block of queries of some rows and heads, given their keys.
        finish: what to keep of the sums after the last block of queries.

    Returns:
        The finished sums `[B, S, ...]` and the outputs `[B, T, ...]`.
    """
    batch, length = jax.tree.leaves(queries)[0].shape[:2]
    head_blocks = 1 if heads is None else heads // plan.heads
    row_blocks, query_blocks = batch // plan.batch, -(-length // plan.queries)
    if row_blocks == head_blocks == query_blocks == 1:
        sums, outputs = fn(start(keys), keys, queries, Block(0, jnp.ones(length, bool)))
        return finish(sums), outputs

    some_heads = None if heads is None else plan.heads
    of_keys = (plan.batch, None, some_heads)
    of_queries = (plan.batch, plan.queries, some_heads)

    def query_block(row, head, own_keys, index, state):
        sums, outputs = state
        first = jnp.minimum(index * plan.queries, length - plan.queries)
        fresh = first + jnp.arange(plan.queries) >= index * plan.queries
        corner = (row, first, head)
        part = jax.tree.map(lambda x: cut(x, corner, of_queries), queries)
        sums, results = fn(sums, own_keys, part, Block(row, fresh))

        def put(whole, result):
            keep = fresh.reshape(-1, *[1] * (result.ndim - 2))
            return _put(whole, jnp.where(keep, result, cut(whole, corner, of_queries)), corner)

        return sums, jax.tree.map(put, outputs, results)

    def outer_block(index, state):
        all_sums, outputs = state
        row, head = index // head_blocks * plan.batch, index % head_blocks * plan.heads
        corner = (row, 0, head)
        own_keys = jax.tree.map(lambda x: cut(x, corner, of_keys), keys)
        step = functools.partial(query_block, row, head, own_keys)
        sums = vary_like(start(own_keys), (keys, queries))
        sums, outputs = _loop(query_blocks, step, (sums, outputs))
        put = functools.partial(_put, corner=corner)
        return jax.tree.map(put, all_sums, finish(sums)), outputs

    def first_block():
        own_keys = jax.tree.map(lambda x: cut(x, (0, 0, 0), of_keys), keys)
        part = jax.tree.map(lambda x: cut(x, (0, 0, 0), of_queries), queries)
        block = Block(0, jnp.ones(plan.queries, bool))
        sums, outputs = fn(start(own_keys), own_keys, part, block)
        return finish(sums), outputs

    def whole(part, length):
        heads_axis = () if part.ndim < 3 else (part.shape[2] * head_blocks,)
        return jnp.zeros((batch, length or part.shape[1], *heads_axis, *part.shape[3:]), part.dtype)

    sums, outputs = jax.eval_shape(first_block)
    sums = jax.tree.map(lambda x: whole(x, None), sums)
    outputs = jax.tree.map(lambda x: whole(x, length), outputs)
    state = vary_like((sums, outputs), (keys, queries))
    return _loop(row_blocks * head_blocks, outer_block, state)


def sum_over_heads(fn: Callable, block: int, total: jax.Array, inputs: Any) -> jax.Array:
    """`total` plus `fn` of one block of heads after another.

    Args:
        fn: `(first head, inputs of the block) -> array like total`.
        block: heads at once, a divisor of N.
        total: where the sum starts.
        inputs: pytree of arrays with heads on the third axis.
    """
    heads = jax.tree.leaves(inputs)[0].shape[2]

    def step(index, total):
        head = index * block
        part = jax.tree.map(lambda x: cut(x, (0, 0, head), (None, None, block)), inputs)
        return total + fn(head, part)

    return _loop(heads // block, step, vary_like(total, inputs))


def cut(x: jax.Array, corner: tuple, sizes: tuple) -> jax.Array:
    """A block of an array: its first axes from `corner` on, None for the whole of an axis."""
    known = [(c, n) if n else (0, full) for c, n, full in zip(corner, sizes, x.shape, strict=False)]
    known += [(0, full) for full in x.shape[len(known) :]]
    return jax.lax.dynamic_slice(x, *zip(*known, strict=True))


def _put(whole: jax.Array, part: jax.Array, corner: tuple) -> jax.Array:
    corner = (*corner, *[0] * whole.ndim)[: whole.ndim]
    return jax.lax.dynamic_update_slice(whole, part, corner)


def _loop(count: int, step: Callable, state: Any) -> Any:
    """A loop, or no loop for a single step: XLA fuses more then."""
    return step(0, state) if count == 1 else jax.lax.fori_loop(0, count, step, state)


def vary_like(tree: Any, like: Any) -> Any:
    """Marks arrays as varying over every manual mesh axis that some array of `like` varies over.

    Inside `shard_map` the carry of a loop must vary as its inputs do, and the cotangents of an op
    as its arguments do; outside it this does nothing. The transpose of the mark is the sum over
    the axis, which is what a replicated argument of a sharded op needs.
    """
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(like)))

    def mark(x):
        missing = tuple(sorted(axes - _varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def _varying(x) -> frozenset:
    return frozenset(jax.typeof(x).manual_axis_type.varying)
