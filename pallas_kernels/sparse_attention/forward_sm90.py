# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false
"""The forward of sparse attention on Hopper: gather, scores, softmax and values overlapped.

A CTA works through (query, 64 heads) pairs for its whole life. Three warpgroups:

    SCORES   S = Q K^T with Q in registers, online softmax, P (bf16) and the rescaling factors
    LEFT     O[:, :C/2] = factor O[:, :C/2] + P V[:, :C/2], and the gather of these columns
    RIGHT    the same for the other half of the columns, and the gather of the tail

The tensor core alternates between S of tile j+1 and P V of tile j; the softmax of tile j+1 runs
while P V of tile j does. For that order LEFT and RIGHT hold tile j back until S of tile j+1 is all
but done (`scored`). A gather follows the P V that frees its slot and has until three tiles later.
Both head halves of a query run as a cluster of two CTAs that share nothing: that they ask for the
same rows at about the same time is what makes the gather fast.

SCORES is the longest of the chains. So its maximum lags (`hopper.softmax`), which mostly spares
everybody the rescaling, its sums are completed once a query, and its descriptors cost one addition
each (`hopper.wgmma.add_products`). Where the keys exceed the L2, queries alternately take their
tiles forth and back, so that one starts with what others read last (`Plan.backwards`).

What flows through the ring are entries: for each piece of work its queries, then its keys in tiles
of 64. An entry is [64, C + R] in three parts: left and right half of the latent in one of three
slots, the tail (the rotary part, or nothing) in one of two. SCORES keeps the queries in registers,
but for the last 64 columns of the latent and the tail. Once S of a tile is done its tail holds P;
once P V of a query's last tile is done, its halves hold the result on its way out.

SMEM at C = 512: 3 x 65,536 + 2 x 8,192 of ring, 16,384 of queries, 1,024 each of indices and of
factors, barriers. Registers of a thread: SCORES 184 (112 of Q, 32 of S), LEFT and RIGHT 160
(128 of O); wgmma operands start at register 24, and 3 x 168 is all that a CTA is given.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.gather import Landing
from pallas_kernels.hopper.tiles import CHUNK, LOG2E, SWIZZLED
from pallas_kernels.sparse_attention import forward_roles
from pallas_kernels.sparse_attention.forward_plan import (
    HEADS,
    INDEX_SLOTS,
    KEYS,
    LEFT,
    RIGHT,
    SCORES,
    SLOTS,
    Plan,
    Shared,
)

# Keys that do not all fit half the L2 of an H100 are worth reading forth and back.
SWEEP_BYTES = 25 * 2**20
_REGISTERS = {SCORES: 184, LEFT: 160, RIGHT: 160}


def _kernel(q, kv, indices, tiles, full, out, lse, *, plan: Plan, **shared):
    rings = [SLOTS] * 4 + [plan.tails]
    words = shared.pop("landed", [shared["factors"]] * len(rings))
    *landings, tail_landing = (
        Landing(ref, 4 * SLOTS * HEADS + 32 * i, slots, plan.interpret)
        for i, (ref, slots) in enumerate(zip(words, rings, strict=True))
    )
    s = Shared(**shared, landings=landings, tail_landing=tail_landing)
    role = lax.axis_index("role")

    @pl.when(role == SCORES)
    def _():
        plgpu.set_max_registers(_REGISTERS[SCORES], action="increase")
        forward_roles.scores(plan, tiles, full, lse, s)

    for side in (LEFT, RIGHT):

        @pl.when(role == side)
        def _(side=side):
            plgpu.set_max_registers(_REGISTERS[side], action="decrease")
            forward_roles.values(plan, side, q, kv, indices, tiles, out, s)


def _scratch(plan: Plan):
    def tile(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)

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
    jax.jit,
    static_argnames=("value_width", "scale", "workspace_bytes", "sms", "sweep", "interpret"),
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
    sweep: bool | None = None,
    interpret=None,
):
    """`(out [B, T, N, value_width], lse [B, T, N])`; needs no workspace.

    Equal bits in every run. With `sweep` (by default where the keys exceed half the L2) the order
    in which a query's keys are added up, so its last bits, depend on where in the call it stands.
    """
    del workspace_bytes
    batch, queries, heads, width = q.shape
    groups = pl.cdiv(heads, HEADS)
    cluster = 2 if groups % 2 == 0 else 1
    work = batch * queries * groups // cluster
    plan = Plan(
        queries=queries,
        rows=kv.shape[1],
        groups=groups,
        half=value_width // 2,
        tail=width - value_width,
        scale=scale * LOG2E,
        work=work,
        clusters=min(sms // cluster, work),
        cluster=cluster,
        sweep=kv.shape[1] * width * 2 > SWEEP_BYTES if sweep is None else sweep,
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
        kernel_name="sparse_attention_forward",
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
