# Mosaic GPU's annotations differ between JAX releases and do not know what its decorators do.
# pyright: reportAbstractUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false
"""kl of each query, and its gradient for the scores, in one pass over mass and score of the pairs.

    p[k] = mass[k] / sum mass          w[k] = softmax(score)[k]
    kl   = sum_k p[k] (log p[k] - log w[k])
    d[k] = w[k] - p[k]

A CTA works on one query, whose pairs it keeps in registers. Lanes are those of `hopper.simt`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.hopper.simt import Words
from pallas_kernels.hopper.simt_floats import fold, launch, number, positive, word
from pallas_kernels.hopper.tiles import LOG2E

_VECTOR = 4  # pairs that a lane loads at once
_PAIRS = 8  # of a lane, where a CTA has no more lanes than it may have
_MAX_THREADS = 1024
_WORDS = 4 * 32


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of a call."""

    queries: int
    selected: int  # K, a multiple of 4

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return min(_MAX_THREADS, 128 * pl.cdiv(self.selected, 128 * _PAIRS))

    @property
    def vectors(self) -> int:
        """Of a lane."""
        return pl.cdiv(self.selected, _VECTOR * self.threads)


def diverge(block: Any, plan: _Plan, query: Any, counts, mass, scores, kl, d=None) -> None:
    """A query's; arrays as of `divergence`."""
    count = word(block, counts, query)
    mass, scores = (block.global_row(x, query, plan.selected) for x in (mass, scores))
    places = [block.thread + n * block.threads for n in range(plan.vectors)]
    last = plan.selected // _VECTOR - 1
    loads = [
        [block.load4_global(x, block.minimum(i, last)) for i in places] for x in (mass, scores)
    ]
    mass, scores = ([word for four in x for word in four] for x in loads)
    exists = [i * _VECTOR + n < count for i in places for n in range(_VECTOR)]
    nothing, lowest = number(block, 0), number(block, -math.inf)
    mass = [block.select(*x, nothing) for x in zip(exists, mass, strict=True)]
    scores = [block.select(*x, lowest) for x in zip(exists, scores, strict=True)]

    def total(turn, values):
        return fold(
            block, Words(32 * turn, 32), _tree(block.add_floats, values), block.add_floats, 0
        )

    all_mass = total(0, mass)
    top = fold(block, Words(32, 32), _tree(block.higher, scores), block.higher, -math.inf)
    # From here on, logarithms are in base 2.
    scale = number(block, LOG2E)
    shifted = [block.multiply(block.subtract(x, top), scale) for x in scores]
    powers = [
        block.select(real, block.exp2(x), nothing) for real, x in zip(exists, shifted, strict=True)
    ]
    all_powers = total(2, powers)
    level = block.log2(all_powers)
    some = positive(all_mass)  # where no head has put any mass, kl is 0 whatever the scores
    terms, slopes = [], []
    for real, m, x, power in zip(exists, mass, shifted, powers, strict=True):
        p = block.select(real & some, block.divide(m, all_mass), nothing)
        log_ratio = block.subtract(block.log2(p), block.subtract(x, level))
        terms.append(block.select(positive(p), block.multiply(p, log_ratio), nothing))
        w = block.select(real & some, block.divide(power, all_powers), nothing)
        slopes.append(block.subtract(w, p))
    found = block.multiply(total(3, terms), number(block, math.log(2)))
    block.store_global(block.global_row(kl, query, 1), block.thread, found, block.thread == 0)
    if d is None:
        return
    out = block.global_row(d, query, plan.selected)
    for n, i in enumerate(places):
        block.store4_global(out, i, slopes[_VECTOR * n : _VECTOR * (n + 1)], i <= last)


def _tree(combine, values):
    """Combines neighbours, then these; short chains."""
    while len(values) > 1:
        values = [combine(*values[i : i + 2]) for i in range(0, len(values), 2)]
    return values[0]


def divergence(counts, mass, scores, *, with_d: bool = True, run=None):
    """`[kl f32 [queries]]`, then d, f32 `[queries, K]`, if asked for.

    Args:
        counts: i32 `[queries]`, how many keys each has: the first of its slots.
        mass: f32 `[queries, K]`, K a multiple of 4; undefined past the count.
        scores: likewise.
        with_d: whether d is asked for.
        run: `simt_floats.simulate` to run on the CPU, with race detection.
    """
    plan = _Plan(*mass.shape)

    def program(block, task, *refs):
        diverge(block, plan, task, *refs)

    shapes = counts.shape, *[mass.shape] * with_d
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    arrays, sizes = (counts, mass, scores), {"threads": plan.threads, "words": _WORDS}
    run, tasks = run or launch, plan.queries
    return run("indexer_loss_divergence", program, results, *arrays, tasks=tasks, **sizes)
