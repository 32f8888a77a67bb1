"""The backward of sparse attention on Hopper, bit-equal between runs.

What is computed, for a window of queries after another, as many as the workspace holds:

    weights_sm90    P and dS, [window, N, K] in bf16
    dq_sm90         dQ = dS K
    rows_sm90       for every query and selected key the row dS^T Q + P^T dO, a part of dKV

Where dKV fits the L2, rows_sm90 adds the rows up there, by atomics, as integers: sums of integers
have no order. Their units come from bounds that weights_sm90 finds (`backward_units`).

Else it stores them in bf16, and add_rows adds up the rows of each key in fp32, in the order of the
queries. Atomics would take longer there: a fp32 row costs 2.3 KB of atomic traffic, a bf16 row 1.15
KB written and 1.15 KB read; and atomics slow down to a third where dKV is larger than the L2. A row
in bf16 is what a matmul in bf16 would give for it; the roundings of a key's rows are independent
and so weigh less in their sum than its own final one. These sums are no kernel of their own, as far
as that is quicker: a warpgroup in the CTAs of dQ or in those of P and dS of the next window adds up
a part of them. The products keep the tensor core busy, the sums wait for the memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import fixed_point
from pallas_kernels.hopper.add_rows import Listed, bounds_of_ranges
from pallas_kernels.hopper.tiles import LOG2E
from pallas_kernels.sparse_attention import (
    backward_units,
    dq_sm90,
    forward_sm90,
    rows_sm90,
    sums_sm90,
    weights_and_sums_sm90,
)
from pallas_kernels.sparse_attention.backward_lists import ascending, pairs_by_key
from pallas_kernels.sparse_attention.backward_shares import share_columns
from pallas_kernels.tiling import vary_like

TILES = 128  # selected keys, of which the kernels take two tiles at a time
# A window costs a pass over dKV in fp32 and the ends of three kernels, so that few are better.
WORKSPACE_BYTES = 4 * 2**30
L2_BYTES = 50 * 2**20
CACHED_BYTES = 40 * 2**20  # of sums that stay in the L2 while rows are added to them


def unsupported(q, kv, *, value_width: int) -> str | None:
    """Why this kernel cannot serve such a call; None where it can."""
    return forward_sm90.unsupported(q, kv, value_width=value_width)


@functools.partial(jax.jit, static_argnames=("scale", "workspace_bytes", "dkv_dtype"))
def backward(
    q, kv, indices, out, lse, dout, dlse, *, scale: float, workspace_bytes: int = 0, dkv_dtype=None
):
    """Gradients of q and kv, in their dtypes or that of kv in another; it is added up in fp32."""
    _, _, heads, width = q.shape
    # P and dS in bf16; and if they are stored, rows in bf16 and two lists in i32. Heads are padded,
    # and split above 128.
    selected, padded = -(-indices.shape[2] // TILES) * TILES, -(-heads // 64) * 64
    of_rows = 0 if _in_cache(kv) else (2 * width + 8) * -(-heads // 128)
    window = max(workspace_bytes, WORKSPACE_BYTES) // (selected * (2 * 2 * padded + of_rows))
    dq, dkv = gradients(q, kv, indices, out, lse, dout, dlse, scale=scale, window=window)
    return dq, dkv.astype(dkv_dtype or kv.dtype)


def gradients(
    q, kv, indices, out, lse, dout, dlse, *,
    scale, window, sms: int = 132, stored: bool | None = None, cuts: Any = None, interpret=None,
):  # fmt: skip
    """The gradients of q, and of kv in f32, with at most so many queries in a window.

    `stored` is whether rows are, and `cuts` where those of a window are divided to be added up; by
    default so that it takes least time.
    """
    stored = not _in_cache(kv) if stored is None else stored
    batch, queries, heads, width = q.shape
    rows = kv.shape[1]
    finite = jnp.isfinite(lse)  # a query without keys gives no gradient, and takes none
    lse, dlse = jnp.where(finite, lse * LOG2E, 0.0), jnp.where(finite, dlse, 0.0)

    # More than 128 heads are as many queries with the same keys.
    split = -(-heads // 128)
    some = -(-heads // split // 64) * 64

    def by_query(x):
        x = jnp.pad(x, [(0, 0), (0, 0), (0, some * split - heads)] + [(0, 0)] * (x.ndim - 3))
        return x.reshape(batch * queries * split, some, *x.shape[3:])

    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, -indices.shape[2] % TILES)), constant_values=-1)
    indices = ascending(indices.reshape(batch * queries, -1), rows)
    indices = jnp.repeat(indices, split, axis=0)
    total, _ = indices.shape
    window = _even(total, max(1, window * split), sms)
    call = _Call(
        arrays=(*(by_query(x) for x in (q, dout, out, lse, dlse)), kv.reshape(-1, width), indices),
        # The kernels write all of it: nothing has to be there before.
        dq=jax.new_ref(lax.empty((total, some, width), q.dtype)),
        scale=scale,
        options={"sms": sms, "interpret": interpret, "window": window},
        queries=queries * split,
        rows=rows,
        total=total,
    )
    if stored:
        dkv = _Stored(call, _cuts(kv.nbytes) if cuts is None else cuts).run()
    else:
        dkv = _Added(call).run()
    # The kernels do not tell over which mesh axes their results vary.
    dq, dkv = vary_like((jax.freeze(call.dq), dkv), (q, kv))
    dq = dq.reshape(batch, queries, -1, width)[:, :, :heads]
    return dq, dkv.reshape(batch, rows, width)


def _in_cache(kv) -> bool:
    """Whether dKV stays in the L2, as 32 bits each, while rows are added to it."""
    return 4 * kv.size <= CACHED_BYTES


def _even(total: int, limit: int, sms: int) -> int:
    """Queries of a window: as few windows as the limit allows, of one size that fills the SMs."""
    window = -(-total // -(-total // min(limit, total)))
    filling = -(-window // sms) * sms
    return filling if filling <= min(limit, total) else window


def _cuts(key_bytes: int) -> tuple[float, float]:
    """Up to where rows are added up beside dQ, and from where on beside P and dS; else alone.

    Rows that pass through the L2 drive keys out of it, above all those of dQ, whose shares of
    columns are gathered at different times; and beside P and dS sums are quick only as long as
    there are few. So this is measured.
    """
    return (0.0, 0.65) if key_bytes <= L2_BYTES else (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the windows of a call have in common. Queries are those of all rows of the batch."""

    arrays: tuple[Any, ...]  # q, dO, O, lse in base 2, dlse, by query and head; keys; selections
    dq: Any  # a ref
    scale: float
    options: dict[str, Any]
    queries: int  # of a row of the batch
    rows: int  # keys of a row of the batch
    total: int  # queries

    @property
    def window(self) -> int:
        """Queries of a window."""
        return self.options["window"]

    @property
    def places(self) -> dict[str, int]:
        """Which queries select from which keys."""
        return {"queries": self.queries, "rows": self.rows}

    @property
    def sums_shape(self) -> tuple[int, int]:
        """Of dKV: keys of all rows of the batch."""
        return self.arrays[-2].shape

    def weights(self, first, **beside):
        """What `weights_and_sums` gives."""
        return weights_and_sums_sm90.weights_and_sums(
            first.reshape(1), *self.arrays, **beside,
            scale=self.scale, **self.places, **self.options,
        )  # fmt: skip

    def store_dq(self, first, dscores, listed: Listed | None = None):
        """Writes dQ of a window."""
        *_, kv, indices = self.arrays
        first = first.reshape(1)
        options = {**self.places, **self.options}
        dq_sm90.dq_of_queries(first, kv, indices, dscores, listed, self.dq, **options)

    def keys(self, first):
        """What the queries of a window select, in all rows of the batch; past them what is none."""
        *_, indices = self.arrays
        number = first + jnp.arange(self.window, dtype=jnp.int32)
        mine = jnp.take(indices, jnp.minimum(number, self.total - 1), axis=0)
        exists = (number < self.total)[:, None] & (mine < self.rows)
        key = mine + (number // self.queries * self.rows)[:, None]
        return jnp.where(exists, key, self.sums_shape[0])

    def for_windows(self, step, carry):
        """`carry = step(carry, first query)` for one window after another."""
        firsts = self.window * jnp.arange(-(-self.total // self.window), dtype=jnp.int32)
        carry = vary_like(carry, self.arrays)
        # A loop of one would copy what is carried; two interpreted kernels in one program wait for
        # each other.
        if len(firsts) == 1 or self.options["interpret"] is not None:
            for first in firsts:
                carry = step(carry, first)
            return carry
        return lax.scan(lambda carry, first: (step(carry, first), None), carry, firsts)[0]


class _Added:
    """Rows are added up in the L2."""

    def __init__(self, call: _Call):
        self.call = call
        *_, self.indices = call.arrays
        q, dout, *_, kv, _ = call.arrays
        self.per_column = backward_units.of_columns(q, dout, kv, call.scale)
        self.repeats = backward_units.repeated(self.indices, call.rows)

    def run(self):
        """dKV."""
        nothing = jnp.zeros(self.call.sums_shape, jnp.float32)
        return self.call.for_windows(self.step, nothing) / self.per_column

    def step(self, dkv, first):
        """Adds what a window does."""
        call, count = self.call, self.call.sums_shape[0]
        weights, dscores, bounds = call.weights(first, per_column=self.per_column)
        per_one, one = backward_units.of_keys(bounds, call.keys(first), self.repeats, count=count)
        parts = 1 if call.options["interpret"] is None else 2
        sums = jax.new_ref(jnp.zeros((parts * count, call.sums_shape[1]), jnp.int32))
        into = rows_sm90.Sums(self.indices, self.per_column, per_one, sums, **call.places)
        q, dout, *_ = call.arrays
        operands = first.reshape(1), q, dout, weights, dscores
        rows_sm90.rows_of_queries(*operands, None, into, **call.options)
        call.store_dq(first, dscores)
        for part in jax.freeze(sums).reshape(parts, count, -1):
            dkv += fixed_point.to_floats(part, one)
        return dkv


class _Lists(NamedTuple):
    """The rows of a window by key: what `hopper.add_rows` goes by."""

    pairs: Any
    keys: Any
    beside_dq: Any  # bounds of ranges of what is added up beside dQ
    alone: Any  # the same of what is added up with nothing beside
    beside_weights: Any  # and beside P and dS of the next window, if there is one
    at_the_end: Any  # and else


class _Stored:
    """Rows are stored, and added up by key."""

    def __init__(self, call: _Call, cuts):
        q, *_, kv, indices = call.arrays
        width = kv.shape[1]
        part, stored = share_columns(width), call.window * indices.shape[1]
        self.call, self.cuts = call, cuts
        self.heads = q.shape[1]
        # Rows of a window; the kernels write all that is read.
        self.rows = jax.new_ref(lax.empty((width // part, stored, part), q.dtype))
        self.sums = jax.new_ref(jnp.zeros(kv.shape, jnp.float32))

    def run(self):
        """dKV."""
        lists = self.call.for_windows(self.step, self.no_lists())
        self.sum(lists, lists.at_the_end)
        return jax.freeze(self.sums)

    def step(self, before: _Lists, first) -> _Lists:
        """The kernels of a window, and what is left to add up of the one before.

        Returns what is left to add up of this one.
        """
        q, dout, *_ = self.call.arrays
        beside = self.listed(before, before.beside_weights)
        weights, dscores = self.call.weights(first, listed=beside)
        operands = first.reshape(1), q, dout, weights, dscores
        rows_sm90.rows_of_queries(*operands, self.rows, **self.call.options)
        lists = self.lists(self.call.keys(first))
        self.sum(lists, lists.alone)
        self.call.store_dq(first, dscores, self.listed(lists, lists.beside_dq))
        return lists

    def listed(self, lists: _Lists, bounds) -> Listed:
        """Ranges of them."""
        return Listed(self.rows, lists.pairs, lists.keys, bounds, self.sums)

    def sum(self, lists: _Lists, bounds) -> None:
        """Adds up ranges of them with nothing beside."""
        sums_sm90.sum_rows(*self.listed(lists, bounds), **self.alone_options())

    def alone_options(self):
        """Of a kernel that has no windows."""
        return {name: self.call.options[name] for name in ("sms", "interpret")}

    def no_lists(self) -> _Lists:
        """Those before the first window."""
        nothing = jnp.zeros(self.rows.shape[1], jnp.int32)
        return _Lists(nothing, nothing, *(jnp.zeros(n + 1, jnp.int32) for n in self.ranges()))

    def lists(self, keys) -> _Lists:
        """Those of a window."""
        none = self.call.sums_shape[0]
        count = jnp.sum(keys < none, dtype=jnp.int32)
        pairs, keys = pairs_by_key(keys, largest=none)
        first_cut, second_cut = (
            (count.astype(jnp.float32) * part).astype(jnp.int32) for part in self.cuts
        )
        limits = (0, first_cut), (first_cut, second_cut), (second_cut, count), (second_cut, count)
        parts = [(*both, n) for both, n in zip(limits, self.ranges(), strict=True)]
        return _Lists(pairs, keys, *bounds_of_ranges(keys, parts))

    def ranges(self) -> tuple[int, int, int, int]:
        """Of the lists, in the order of `_Lists`."""
        some = self.rows.shape[1], self.call.sums_shape[1]
        options = self.alone_options()
        alone = sums_sm90.adder_of(*some, **options).ranges
        return (
            dq_sm90.adder_of(*some, **options).ranges,
            alone,
            weights_and_sums_sm90.adder_of(*some, self.heads, **options).ranges,
            alone,
        )
