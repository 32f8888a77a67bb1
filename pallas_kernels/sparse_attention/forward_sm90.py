# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""The forward of sparse attention on Hopper: gather, scores, softmax and values overlapped.

A CTA works through (query, 64 heads) pairs for its whole life. Three warpgroups:

    SCORES   S = Q K^T with Q in registers, online softmax, P (bf16) and the rescaling factors
    LEFT     O[:, :C/2] = factor O[:, :C/2] + P V[:, :C/2], and the gather of these columns
    RIGHT    the same for the other half of the columns, and the gather of the tail

The tensor core alternates between S of tile j+1 and P V of tile j; the softmax of tile j+1 runs
while P V of tile j does. For that order LEFT and RIGHT hold tile j back until S of tile j+1 is
done (`scored`). A gather follows the P V that frees its slot and has until three tiles later. Both
head halves of a query run as a cluster of two CTAs that share nothing: that they ask for the same
rows at the same time is what makes the gather fast.

What flows through the ring are entries: for each piece of work its queries, then its keys in tiles
of 64. An entry is [64, C + R] in three parts: left and right half of the latent in one of three
slots, the tail (the rotary part, or nothing) in one of two. SCORES keeps the queries in registers,
but for the last 64 columns of the latent and the tail. Once S of a tile is done its tail holds P;
once P V of a query's last tile is done, its halves hold the result on its way out.

SMEM at C = 512: 3 x 65,536 + 2 x 8,192 of ring, 16,384 of queries, 1,024 each of indices and of
factors, barriers. Registers of a thread: SCORES 184 (112 of Q, 32 of S), LEFT and RIGHT 160
(128 of O); wgmma operands start at register 24.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import TILE, Landing, gather_rows, warpgroup_barrier
from pallas_kernels.hopper.wgmma import Product, Until, multiply_add

HEADS = 64  # of a CTA: one wgmma's rows
KEYS = 64  # of a tile
CHUNK = 64  # columns that a 128-byte swizzle spans
SLOTS = 3  # of the ring
INDEX_SLOTS = 4
SCORES, LEFT, RIGHT = range(3)
_REGISTERS = {SCORES: 184, LEFT: 160, RIGHT: 160}
TUNE = {}  # TEMPORARY
_LOWEST = -1e30  # where the running maximum starts: finite, so that exp2(it - it) is 1, not NaN
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of a call."""

    queries: int  # T, of one batch row
    rows: int  # S, of one batch row
    groups: int  # of 64 heads
    half: int  # C / 2
    tail: int  # columns of the rotary part: 64, or 0
    scale: float  # of the scores, in base 2
    work: int  # pieces: a query and the head groups of a cluster
    clusters: int
    cluster: int  # CTAs of a cluster: 2 or 1
    interpret: bool

    @property
    def tails(self) -> int:
        """Slots for tails, which hold P in the end.

        Where kv has a tail, loading it waits for P V two tiles before; else the rest of the tile
        must do, which waits for P V three tiles before.
        """
        return 2 if self.tail else SLOTS

    @property
    def middle(self) -> int:
        """Where the two accumulators of LEFT or RIGHT meet."""
        return self.half // 2 // CHUNK * CHUNK

    def query(self, work):
        return lax.div(work, jnp.int32(self.groups // self.cluster))

    def heads(self, work):
        shared = lax.rem(work, jnp.int32(self.groups // self.cluster))
        return pl.ds((shared * self.cluster + lax.axis_index("half")) * HEADS, HEADS)

    def first_row(self, work):
        return lax.div(self.query(work), jnp.int32(self.queries)) * self.rows


@dataclasses.dataclass(frozen=True)
class _Shared:
    """SMEM and barriers."""

    left: Any  # bf16 [SLOTS, 64, C/2]
    right: Any
    tail: Any  # bf16 [2 or 3, 64, 64]
    query_last: Any  # bf16 [64, 64]: the last columns of the latent
    query_tail: Any  # bf16 [64, 64]
    picked: Any  # i32 [INDEX_SLOTS, 64]: indices of the tiles
    factors: Any  # f32 [4, 64]: of the accumulator, one row a slot; the last holds Landing's words
    query_full: Any
    query_read: Any  # SCORES has taken the queries out of the ring
    picked_full: Any
    weighed: Any  # P and the factors of the slot are there
    scored: Any  # S of the tile after the slot's is done (or there is none): P V may start
    tail_read: Any  # LEFT no longer needs P
    started: Any
    landings: list[Landing]  # of the first and the last columns of LEFT, then of RIGHT
    tail_landing: Landing


class _Place(NamedTuple):
    """Where an entry is in the rings."""

    slot: Any
    tail: Any

    def next(self, plan: _Plan) -> _Place:
        return _Place(_next(self.slot, SLOTS), _next(self.tail, plan.tails))


class _Entry(NamedTuple):
    """An entry to be loaded: tile -1 are the queries of the work; work may be past the end."""

    work: Any
    tile: Any
    count: Any  # tiles of the work
    index_slot: Any  # of the tile, or of the next


def _next(slot, slots):
    return jnp.where(slot == slots - 1, 0, slot + 1)


def _for_each_work(plan: _Plan, body, carry):
    """`carry = body(work, carry)` over this cluster's share."""
    first = lax.axis_index("cluster")
    count = lax.div(plan.work - 1 - first, jnp.int32(plan.clusters)) + 1
    return lax.fori_loop(0, count, lambda i, c: body(first + i * plan.clusters, c), carry)


class _Loader:
    """The half of LEFT and RIGHT that fills the ring, three entries ahead (the tail: two)."""

    def __init__(self, plan: _Plan, side: int, q, kv, indices, tiles, s: _Shared):
        self.plan, self.side, self.s = plan, side, s
        self.q, self.kv, self.indices, self.tiles = q, kv, indices, tiles
        self.ring = s.left if side == LEFT else s.right
        self.first_column = 0 if side == LEFT else plan.half
        self.landings = s.landings[:2] if side == LEFT else s.landings[2:]

    def first(self) -> _Entry:
        work = lax.axis_index("cluster")
        if self.side == LEFT:
            self._fetch_indices(work, 0, 0)
        count = self.tiles[self.plan.query(work)]
        return _Entry(work, jnp.int32(-1), count, jnp.int32(0))

    def following(self, entry: _Entry) -> _Entry:
        """The entry after; LEFT also sends for the indices that will be needed next."""
        plan = self.plan
        loaded = jnp.where(entry.tile >= 0, 1, 0)
        index_slot = lax.rem(entry.index_slot + loaded, jnp.int32(INDEX_SLOTS))
        last = entry.tile == entry.count - 1
        work = jnp.where(last, entry.work + plan.clusters, entry.work)
        more = work < plan.work
        if self.side == LEFT:

            @pl.when(jnp.logical_and(entry.tile >= 0, more))
            def _():
                self._fetch_indices(work, jnp.where(last, 0, entry.tile + 1), index_slot)

        count = lax.cond(
            jnp.logical_and(last, more),
            lambda: self.tiles[plan.query(work)],
            lambda: entry.count,
        )
        return _Entry(work, jnp.where(last, -1, entry.tile + 1), count, index_slot)

    def _fetch_indices(self, work, tile, index_slot):
        plgpu.copy_gmem_to_smem(
            self.indices.at[self.plan.query(work), pl.ds(tile * KEYS, KEYS)],
            self.s.picked.at[index_slot],
            self.s.picked_full.at[index_slot],
        )

    def load(self, entry: _Entry, place: _Place, part: int):
        """Starts a part of this side's half of an entry, three entries ahead.

        The parts of a tile are its first columns, most of the others, and the rest. Of queries
        all goes with part 1.
        """
        more = entry.work < self.plan.work
        target = self.ring.at[place.slot]
        if part == 1:

            @pl.when(jnp.logical_and(more, entry.tile < 0))
            def _():
                self._fetch_queries(entry, target, self.first_column, place.slot)

        @pl.when(jnp.logical_and(more, entry.tile >= 0))
        def _():
            if part == 0:
                plgpu.barrier_wait(self.s.picked_full.at[entry.index_slot])
            self._gather(entry, target, self.first_column, place.slot, part)

    def load_tail(self, entry: _Entry, place: _Place):
        """Starts the tail of an entry, two entries ahead; RIGHT does."""
        if not self.plan.tail or self.side == LEFT:
            return
        more = entry.work < self.plan.work
        target = self.s.tail.at[place.tail]
        first_column = 2 * self.plan.half

        @pl.when(jnp.logical_and(more, entry.tile < 0))
        def _():
            # The entry is one ahead of the slot's, two ahead of this one's.
            slot = lax.rem(place.slot + 2, jnp.int32(SLOTS))
            self._fetch_queries(entry, target, first_column, slot)

        @pl.when(jnp.logical_and(more, entry.tile >= 0))
        def _():
            self._gather(entry, target, first_column, place.tail, None)

    def _fetch_queries(self, entry, target, first_column, slot):
        columns = pl.ds(first_column, target.shape[-1])
        source = self.q.at[self.plan.query(entry.work), self.plan.heads(entry.work), columns]
        plgpu.copy_gmem_to_smem(source, target, self.s.query_full.at[slot])

    def _gather(self, entry, target, first_column, slot, part):
        half, s = self.plan.half, self.s
        middle, most = self.plan.middle, half - int(TUNE.get("late", CHUNK))
        columns = {None: (0, CHUNK), 0: (0, middle), 1: (middle, most), 2: (most, half)}[part]
        if columns[0] == columns[1]:
            return
        gather_rows(
            self.kv,
            s.picked.at[entry.index_slot],
            target,
            s.tail_landing if part is None else self.landings[min(part, 1)],
            slot,
            first_row=self.plan.first_row(entry.work),
            rows=self.plan.rows,
            first_column=first_column,
            columns=columns,
            arrive=part != 1,
            skip="nogather" in TUNE,
            hint=TUNE.get("hint", "128B"),
        )


def _scores(plan: _Plan, tiles, full, lse, s: _Shared):
    """S, the softmax, and P; at a query's last tile P and the factors are divided by the sum."""
    row = plgpu.Layout.WGMMA.reduce(1)
    column = plgpu.Layout.WGMMA.reduce(0)
    chunks = [
        (ref, pl.ds(i, CHUNK)) for ref in (s.left, s.right) for i in range(0, plan.half, CHUNK)
    ]

    middle = plan.middle // CHUNK
    first_chunks = [0, middle, plan.half // CHUNK, plan.half // CHUNK + middle]

    def over_keys(x):
        return lax.broadcast_in_dim(x, (HEADS, KEYS), (0,))

    def load_query(place):
        plgpu.barrier_wait(s.query_full.at[place.slot])
        kept = []
        for ref, columns in chunks[:-1]:
            kept.append(plgpu.load(ref.at[place.slot, :, columns], layout=plgpu.Layout.WGMMA))
            # One at a time: LDSM's registers are not wgmma's, and there are none to spare.
            warpgroup_barrier(plan.interpret)
        ref, columns = chunks[-1]
        s.query_last[...] = plgpu.load(ref.at[place.slot, :, columns], layout=plgpu.Layout.WGMMA)
        if plan.tail:
            s.query_tail[...] = plgpu.load(s.tail.at[place.tail], layout=plgpu.Layout.WGMMA)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.query_read.at[place.slot])
        return kept

    def score(query, j, place, previous, index_slot, phases, tail_phases, masked):
        """Raw S. It starts from -inf where there is no key: so the softmax needs no mask."""
        plgpu.barrier_wait(s.picked_full.at[index_slot])
        start = plgpu.layout_cast(jnp.zeros((HEADS, KEYS), jnp.float32), plgpu.Layout.WGMMA)
        if masked:
            index = plgpu.load(s.picked.at[index_slot], layout=column)
            exists = jnp.logical_and(index >= 0, index < plan.rows)
            mask = jnp.where(exists, 0.0, -jnp.inf).astype(jnp.float32)
            start = lax.broadcast_in_dim(mask, (HEADS, KEYS), (1,))
        steps = []
        for number, (left, (ref, columns)) in enumerate(
            zip([*query, s.query_last], chunks, strict=True)
        ):
            if number in first_chunks:
                landing = s.landings[first_chunks.index(number)]
                steps.append(functools.partial(landing.wait, place.slot, phases))
            steps.append(Product(0, left, ref.at[place.slot, :, columns].T))
        if plan.tail:
            steps.append(functools.partial(s.tail_landing.wait, place.tail, tail_phases))
            steps.append(Product(0, s.query_tail, s.tail.at[place.tail].T))

        def nearly():
            plgpu.barrier_arrive(s.scored.at[previous], predicate=j > 0)

        if "early" in TUNE:
            steps += [Until(int(TUNE["early"])), nearly]
        else:
            steps += [Until(0), nearly]
        [scores] = multiply_add([start], steps, plan.interpret)
        return scores

    def tile(query, j, carry, *, masked=True, last=False):
        top, total, place, previous, index_slot, phases = carry
        scores = score(query, j, place, previous, index_slot, *phases, masked)
        phases = Landing.next(place.slot, phases[0]), Landing.next(place.tail, phases[1])
        new_top = jnp.maximum(top, scores.max(axis=1))
        factor = jnp.exp2((top - new_top) * plan.scale)
        weights = jnp.exp2(scores * plan.scale - over_keys(new_top * plan.scale))
        total = total * factor + weights.sum(axis=1)
        if last:
            inverse = jnp.where(total > 0, 1.0 / total, 0.0)
            factor *= inverse
            weights *= over_keys(inverse)
        s.tail.at[place.tail][...] = weights.astype(jnp.bfloat16)
        s.factors.at[place.slot][...] = factor
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.weighed.at[place.slot])
        if last:
            plgpu.barrier_arrive(s.scored.at[place.slot])
        return new_top, total, place.next(plan), place.slot, _next(index_slot, INDEX_SLOTS), phases

    def work_item(work, carry):
        place, index_slot, phases = carry
        count = tiles[plan.query(work)]
        query = load_query(place)
        top = plgpu.layout_cast(jnp.full((HEADS,), _LOWEST, jnp.float32), row)
        total = plgpu.layout_cast(jnp.zeros((HEADS,), jnp.float32), row)
        carry = top, total, place.next(plan), place.slot, index_slot, phases
        whole = jnp.minimum(full[plan.query(work)], count - 1)
        body = functools.partial(tile, query, masked=False)
        carry = lax.fori_loop(0, whole, body, carry)
        carry = lax.fori_loop(whole, count - 1, functools.partial(tile, query), carry)
        top, total, place, _, index_slot, phases = tile(query, count - 1, carry, last=True)
        value = jnp.where(total > 0, (top * plan.scale + jnp.log2(total)) / _LOG2E, -jnp.inf)
        lse.at[plan.query(work), plan.heads(work)][...] = value
        return place, index_slot, phases

    for landing in (*s.landings, s.tail_landing):
        landing.initialize()
    plgpu.barrier_arrive(s.started)
    zero = jnp.int32(0)
    _for_each_work(plan, work_item, (_Place(zero, zero), zero, (zero, zero)))


def _values(plan: _Plan, side: int, q, kv, indices, tiles, out, s: _Shared):
    """One half of the columns of O, and of the gather."""
    loader = _Loader(plan, side, q, kv, indices, tiles, s)
    values = loader.ring
    parts = [pl.ds(0, plan.middle), pl.ds(plan.middle, plan.half - plan.middle)]
    if "n256" in TUNE:
        parts = [pl.ds(0, plan.half)]

    def weigh(accs, place, late, entry):
        """One tile's P V. Loads meanwhile what is `late`, and `entry` where P V has passed."""
        plgpu.barrier_wait(s.weighed.at[place.slot])
        factor = plgpu.load(s.factors.at[place.slot], layout=plgpu.Layout.WGMMA.reduce(1))
        accs = [acc * lax.broadcast_in_dim(factor, acc.shape, (0,)) for acc in accs]
        plgpu.barrier_wait(s.scored.at[place.slot])

        def first_columns():
            warpgroup_barrier(plan.interpret)
            loader.load(entry, place, 0)

        steps = [
            Product(i, s.tail.at[place.tail], values.at[place.slot, :, part])
            for i, part in enumerate(parts)
        ]
        steps.append(lambda: loader.load(*late, 2))
        if entry is not None and "n256" not in TUNE:
            steps += [Until(1), first_columns]
        accs = multiply_add(accs, steps, plan.interpret)
        if side == LEFT:
            plgpu.barrier_arrive(s.tail_read.at[place.tail])
        else:
            plgpu.barrier_wait(s.tail_read.at[place.tail])
        return accs

    def refill(place, ahead):
        """Most of what takes the place of an entry that is done; returns what is late."""
        tail_entry, entry = ahead
        loader.load_tail(tail_entry, place)
        loader.load(entry, place, 1)
        return (entry, loader.following(entry)), (entry, place)

    def work_item(work, carry):
        place, ahead, late = carry
        loader.load(*late, 2)
        plgpu.barrier_wait(s.query_read.at[place.slot])
        loader.load(ahead[1], place, 0)
        ahead, late = refill(place, ahead)

        def body(_, carry):
            accs, place, ahead, late = carry
            accs = weigh(accs, place, late, ahead[1])
            warpgroup_barrier(plan.interpret)
            if "n256" in TUNE:
                loader.load(ahead[1], place, 0)
            return accs, place.next(plan), *refill(place, ahead)

        accs = [
            plgpu.layout_cast(jnp.zeros((HEADS, part.size), jnp.float32), plgpu.Layout.WGMMA)
            for part in parts
        ]
        count = tiles[plan.query(work)]
        carry = accs, place.next(plan), ahead, late
        accs, place, ahead, late = lax.fori_loop(0, count - 1, body, carry)
        accs = weigh(accs, place, late, None)
        warpgroup_barrier(plan.interpret)
        for acc, part in zip(accs, parts, strict=True):
            values.at[place.slot, :, part][...] = acc.astype(jnp.bfloat16)
        plgpu.commit_smem()
        target = out.at[plan.query(work), plan.heads(work), pl.ds(loader.first_column, plan.half)]
        plgpu.copy_smem_to_gmem(values.at[place.slot], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        warpgroup_barrier(plan.interpret)
        loader.load(ahead[1], place, 0)
        return place.next(plan), *refill(place, ahead)

    plgpu.barrier_wait(s.started)
    place = start = _Place(jnp.int32(0), jnp.int32(0))
    previous = entry = loader.first()
    for number in range(SLOTS):
        for part in range(3):
            loader.load(entry, place, part)
        if number < plan.tails:  # `load_tail` counts from the entry two before
            before = lax.rem(place.slot + 1, jnp.int32(SLOTS))
            loader.load_tail(entry, _Place(before, place.tail))
        previous, entry, place = entry, loader.following(entry), place.next(plan)
    # Nothing is late yet: an entry past the end.
    nothing = entry._replace(work=jnp.int32(plan.work))
    _for_each_work(plan, work_item, (start, (previous, entry), (nothing, start)))
    plgpu.wait_smem_to_gmem(0)


def _kernel(q, kv, indices, tiles, full, out, lse, *, plan: _Plan, **shared):
    rings = [SLOTS] * 4 + [plan.tails]
    words = shared.pop("landed", [shared["factors"]] * len(rings))
    *landings, tail_landing = (
        Landing(ref, 4 * SLOTS * HEADS + 32 * i, slots, plan.interpret)
        for i, (ref, slots) in enumerate(zip(words, rings, strict=True))
    )
    s = _Shared(**shared, landings=landings, tail_landing=tail_landing)
    role = lax.axis_index("role")

    @pl.when(role == SCORES)
    def _():
        plgpu.set_max_registers(_REGISTERS[SCORES], action="increase")
        _scores(plan, tiles, full, lse, s)

    for side in (LEFT, RIGHT):

        @pl.when(role == side)
        def _(side=side):
            plgpu.set_max_registers(_REGISTERS[side], action="decrease")
            _values(plan, side, q, kv, indices, tiles, out, s)


def _scratch(plan: _Plan):
    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILE)

    scratch = {
        "left": tile(SLOTS, KEYS, plan.half),
        "right": tile(SLOTS, KEYS, plan.half),
        "tail": tile(plan.tails, KEYS, CHUNK),
        "query_last": tile(HEADS, CHUNK),
        "query_tail": tile(HEADS, CHUNK) if plan.tail else None,
        "picked": plgpu.SMEM((INDEX_SLOTS, KEYS), jnp.int32),
        "factors": plgpu.SMEM((SLOTS + 1, HEADS), jnp.float32),
        "query_full": plgpu.Barrier(num_arrivals=3 if plan.tail else 2, num_barriers=SLOTS),
        "query_read": plgpu.Barrier(num_barriers=SLOTS),
        "picked_full": plgpu.Barrier(num_barriers=INDEX_SLOTS),
        "weighed": plgpu.Barrier(num_barriers=SLOTS),
        "scored": plgpu.Barrier(num_barriers=SLOTS),
        "tail_read": plgpu.Barrier(num_barriers=plan.tails),
        "started": plgpu.Barrier(),
    }
    if plan.interpret:
        scratch["landed"] = [plgpu.Barrier(num_barriers=n) for n in [SLOTS] * 4 + [plan.tails]]
    return scratch


def unsupported(q, kv, *, value_width: int) -> str | None:
    """Why this kernel cannot serve such a call; None where it can."""
    if q.dtype != jnp.bfloat16 or kv.dtype != jnp.bfloat16:
        return f"q and kv are {q.dtype} and {kv.dtype}, the kernel takes bfloat16"
    if value_width not in (256, 512):
        return f"value_width is {value_width}, the kernel takes 256 or 512"
    if q.shape[-1] - value_width not in (0, KEYS):
        return (
            f"q and kv have {q.shape[-1]} columns, the kernel takes value_width = {value_width}, "
            f"or {KEYS} more"
        )
    return None


@functools.partial(
    jax.jit, static_argnames=("value_width", "scale", "workspace_bytes", "sms", "interpret")
)
def forward(
    q,
    kv,
    indices,
    *,
    value_width: int,
    scale: float,
    workspace_bytes: int = 0,
    sms: int = 132,
    interpret=None,
):
    """`(out [B, T, N, value_width], lse [B, T, N])`; needs no workspace."""
    del workspace_bytes
    batch, queries, heads, width = q.shape
    groups = pl.cdiv(heads, HEADS)
    cluster = 2 if groups % 2 == 0 and 'solo' not in TUNE else 1
    work = batch * queries * groups // cluster
    plan = _Plan(
        queries=queries,
        rows=kv.shape[1],
        groups=groups,
        half=value_width // 2,
        tail=width - value_width,
        scale=scale * _LOG2E,
        work=work,
        clusters=min(sms // cluster, work),
        cluster=cluster,
        interpret=interpret is not None,
    )
    q = jnp.pad(q, ((0, 0), (0, 0), (0, groups * HEADS - heads), (0, 0)))
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, -indices.shape[2] % KEYS)), constant_values=-1)
    total = batch * queries
    out, lse = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=[
            jax.ShapeDtypeStruct((total, groups * HEADS, value_width), q.dtype),
            jax.ShapeDtypeStruct((total, groups * HEADS), jnp.float32),
        ],
        scratch_types=_scratch(plan),
        grid=(plan.clusters,),
        grid_names=("cluster",),
        cluster=(cluster,),
        cluster_names=("half",),
        num_threads=3,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({"interpret": interpret} if interpret is not None else {}),
    )(
        q.reshape(total, groups * HEADS, width),
        kv.reshape(-1, width),
        indices.reshape(total, -1),
        *(x.reshape(total) for x in _tiles(indices, kv.shape[1])),
    )
    out = out.reshape(batch, queries, -1, value_width)[:, :, :heads]
    return out, lse.reshape(batch, queries, -1)[:, :, :heads]


def _tiles(indices, rows):
    """Tiles of each query up to its last key, and those that come before any hole.

    At least one up to the last key: so every query is served, if only with zeros.
    """
    exists = (indices >= 0) & (indices < rows)
    number = jnp.arange(indices.shape[-1], dtype=jnp.int32)
    last = jnp.max(jnp.where(exists, number + 1, 0), axis=-1)
    hole = jnp.min(jnp.where(exists, indices.shape[-1], number), axis=-1)
    return jnp.maximum(pl.cdiv(last, KEYS), 1), hole // KEYS
