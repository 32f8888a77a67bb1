"""The sparse loss's kernels in GPU interpret mode with race detection (ring 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Selection, UnsupportedError, indexer_kl_sparse
from pallas_kernels.hopper import simt_floats
from pallas_kernels.indexer_loss import (
    reference,
    sparse_bounds_sm90,
    sparse_divergence_sm90,
    sparse_lists_sm90,
    sparse_sm90,
)
from pallas_kernels.sparse_attention import reference as sparse_attention

SCALE = 0.1


def normal(rng, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)


def interpret():
    return plgpu.InterpretGPUParams(detect_races=True)


def no_races():
    return not interpret_pallas_call.get_races().races_found


def arguments(batch, queries, keys, heads, selected, width=64, index_width=64, index_heads=64):
    """Rows with all, no, one and some keys, each out of one of two documents."""
    rng = np.random.default_rng(0)
    iq, ik = (
        normal(rng, batch, queries, index_heads, index_width),
        normal(rng, batch, keys, index_width),
    )
    ik = ik.at[:, 1::2].set(ik[:, ::2])  # every score twice
    iw = normal(rng, batch, queries, index_heads, dtype=jnp.float32) / 8  # of either sign
    q, kv = normal(rng, batch, queries, heads, width), normal(rng, batch, keys, width)
    # What no query selects.
    kv, ik = kv.at[:, -2:].set(jnp.nan), ik.at[:, -2:].set(jnp.nan)
    indices = np.full((batch, queries, selected), -1, np.int32)
    for row, (b, t) in enumerate(np.ndindex(batch, queries)):
        first, end = [(0, keys // 3), (keys // 3, keys - 2)][row % 2]
        count = [40, selected, 0, 130, 1, 64][row % 6]
        some = first + rng.permutation(end - first)[: min(count, selected)]
        indices[b, t, : len(some)] = np.sort(some)
    indices[0, -1, 1], indices[-1, 1 % queries, 2] = keys, -7
    indices[-1, 0, selected // 8] = keys + 1  # with keys before and after
    indices = jnp.asarray(indices)
    _, lse = sparse_attention.forward(
        q, kv, indices, value_width=width, scale=SCALE, workspace_bytes=2**28
    )
    return iq, ik, iw, q, kv, lse, indices


def test_value_and_gradient(monkeypatch):
    """Heads and selected keys that are no whole tiles, two windows, every slot filled again.

    Six queries on four CTAs: two are divided.
    """
    inputs = iq, ik, iw, q, kv, lse, indices = arguments(2, 3, 400, 70, 140, index_width=128)
    kl, *rest = sparse_sm90.compare(
        *inputs, scale=SCALE, for_gradient=True, sms=4, interpret=interpret()
    )
    assert no_races()
    g = normal(np.random.default_rng(1), 2, 3, dtype=jnp.float32)
    residuals = sparse_sm90.Residuals(iq, ik, iw, *rest)
    np.testing.assert_array_equal(residuals.sizes, jnp.abs(iq).max(axis=-1))
    exact = oracle.indexer_kl_sparse(iq, ik, iw, q, kv, indices, scale=SCALE)
    # fp32 sums of terms as large as a few nats; the attention's lse, too, is fp32.
    np.testing.assert_allclose(kl, exact, rtol=3e-6, atol=3e-6)
    assert (np.asarray(kl) == 0).sum() == 2  # those with one key or none
    wide = [x.astype(jnp.float32) for x in (iq, ik, iw, q, kv)]
    want = reference.sparse_backward((*wide, lse, indices), g, scale=SCALE, workspace_bytes=2**28)
    for cached in (True, False):  # rows are added up in the L2, or stored
        monkeypatch.setattr(sparse_sm90, "in_cache", lambda size, cached=cached: cached)
        # Not jitted: two interpreted kernels in one program wait for each other.
        found = sparse_sm90.gradients(residuals, g, window=5, sms=1, interpret=interpret())
        assert no_races()
        for gradient, expected, value in zip(found, want, (iq, ik, iw), strict=True):
            assert gradient.dtype == value.dtype
            gradient, expected = np.asarray(gradient, np.float64), np.asarray(expected, np.float64)
            # d, the masked products, the rows and the results are rounded to bf16 (2**-9 of each).
            assert np.linalg.norm(gradient - expected) / np.linalg.norm(expected) < 6e-3


@pytest.mark.parametrize(("heads", "width"), [(16, 320), (128, 192)])
def test_target(heads, width):
    """One group of heads, and two; keys in several parts, of which one is narrow, or overlaps."""
    inputs = iq, ik, iw, q, kv, _, indices = arguments(1, 2, 300, heads, 260, width=width)
    kl, *_ = sparse_sm90.compare(*inputs, scale=SCALE, sms=1, interpret=interpret())
    assert no_races()
    exact = oracle.indexer_kl_sparse(iq, ik, iw, q, kv, indices, scale=SCALE)
    np.testing.assert_allclose(kl, exact, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(("kernel", "selected"), [(False, 52), (True, 64), (True, 1280)])
def test_divergence(kernel, selected):
    """Against the reference's; queries without keys, and one whose heads put no mass on any.

    The twin, and the kernel's program lane by lane.
    """
    rng = np.random.default_rng(0)
    mass = jnp.asarray(rng.uniform(0, 2, (2, 4, selected)) ** 8, jnp.float32)
    mass = mass.at[0, 1].set(0.0).at[1, 2, 3:9].set(0.0)
    scores = jnp.asarray(5 * rng.standard_normal(mass.shape), jnp.float32)
    counts = np.array([[selected, 20, 0, 1], [7, 33, selected - 10, 2]], np.int32)
    exists = jnp.arange(selected) < counts[..., None]
    mass, scores = (jnp.where(exists, x, jnp.nan) for x in (mass, scores))
    if kernel:
        flat = (np.asarray(x).reshape(-1, selected) for x in (mass, scores))
        run = simt_floats.simulate
        found = sparse_divergence_sm90.divergence(counts.reshape(-1), *flat, run=run)
        kl, d = (x.reshape(like.shape) for x, like in zip(found, (counts, mass), strict=True))
    else:
        kl, d = sparse_sm90.divergence(mass, scores, exists)
    known, real = jnp.where(exists, mass, 0.0), jnp.where(exists, scores, 0.0)
    p = reference.normalised(known)
    # The GPU's exp2 and log2 are good to 2^-22; sums of up to 1280 fp32 terms, of a few nats.
    np.testing.assert_allclose(kl, reference.divergence(p, real, exists), rtol=1e-5, atol=1e-6)
    want = reference.scores_gradient(p, real, exists)
    np.testing.assert_allclose(d, want, rtol=1e-5, atol=1e-6)
    assert kl[0, 1] == kl[0, 2] == kl[0, 3] == 0
    assert not d[0, 1:].any()


@pytest.mark.parametrize("first", [0, 4])
def test_lists(first):
    """The kernels' programs lane by lane against what they stand for; past the last query, too."""
    rng = np.random.default_rng(0)
    batch, queries, keys, selected = 2, 3, 300, 128
    counts = np.array([selected, 0, 77, 1, 64, 100], np.int32)
    indices = np.full((batch * queries, selected), keys, np.int32)
    for row, count in enumerate(counts):
        indices[row, :count] = np.sort(rng.choice(keys, count, replace=False))
    sizes = dict(window=4, queries=queries, rows=keys, blocks=-(-batch * keys // 64))
    given = np.array([first], np.int32), counts, indices
    found = sparse_lists_sm90.pairs_by_block(*given, **sizes, simulate=True)
    want = sparse_lists_sm90.twin(*map(jnp.asarray, given), **sizes)
    end = 64 * int(want[1].sum())
    assert end > 2 * 64
    for one, other in zip(found, want, strict=True):
        np.testing.assert_array_equal(one[:end], other[:end])
    entries = np.asarray(want[2])[:end]
    assert (entries >= 0).sum() == counts[first : first + 4].sum()


def test_no_numbers():
    """What is not finite spoils its query, and no other."""
    mass, scores, counts = np.ones((6, 64), np.float32), np.ones((6, 64), np.float32), [64] * 6
    mass[1, 3], mass[2, 3], scores[3, 3], scores[4, 3] = np.inf, np.nan, np.inf, np.nan
    mass[5, 3:7], scores[5] = 2, np.arange(64)
    counts = np.array(counts, np.int32)
    found = sparse_divergence_sm90.divergence(counts, mass, scores, run=simt_floats.simulate)
    want = sparse_sm90.divergence(jnp.asarray(mass), jnp.asarray(scores), mass == mass)
    for one, other in zip(found, map(np.asarray, want), strict=True):  # as in test_divergence
        np.testing.assert_allclose(one[[0, 5]], other[[0, 5]], rtol=1e-5, atol=1e-6)
    assert not np.isfinite(found[1][[1, 3, 4]]).all(axis=1).any()


def test_factors_bound_rows():
    """Whichever products are positive; tightly where all heads agree, within two bits else."""
    rng = np.random.default_rng()
    iq, iw = rng.standard_normal((5, 64, 128)), rng.standard_normal((5, 64))
    iq[0], iw[0] = 3.0, np.abs(iw[0])
    iw[1, 5:] = 0.0
    g = np.array([1.0, -2.0, 1e-9, 1e9, 0.0])
    terms = iw[..., None] * iq * g[:, None, None]
    largest = np.maximum(terms.clip(0).sum(axis=1), -terms.clip(max=0).sum(axis=1)).max(axis=1)
    found = sparse_sm90.row_factors(*map(np.float32, (g, iw, np.abs(iq).max(axis=2))))
    # Two factors that are rounded to bf16 gain up to 2^-9 each, and their fp32 sum far less.
    assert (found >= largest * (1 + 2**-8)).all()
    assert (found[2:4] <= 8 * largest[2:4]).all()
    np.testing.assert_allclose(found[0], (1 + 2**-6) * largest[0], rtol=1e-5)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("table", [4096, None])
def test_bounds_of_rows(first, table, monkeypatch):
    """The twin, and the kernel's program lane by lane; one table of the keys, and two."""
    rng = np.random.default_rng()
    batch, queries, keys, selected, window = 2, 3, 2100, 640, 3
    total = batch * queries
    if table:
        monkeypatch.setattr(sparse_bounds_sm90, "TABLE", table)
    d = normal(rng, total, selected, dtype=jnp.float32)
    g = np.array([0, 1e-9, 1, 1e9, -1, 1e30], np.float32)
    indices = np.full((total, selected), keys, np.int32)
    for row, count in enumerate([40, 3, selected, 20, 0, 1]):
        indices[row, :count] = np.sort(rng.choice(keys, count, replace=False))
    d = jnp.where(indices < keys, d, 0.0)
    if first == 0:
        g[0] = np.nan  # of a query with fewer keys than slots
    plan = sparse_sm90._Plan(queries, keys, batch * keys, window, 4)
    twin = sparse_sm90.bounds(jnp.int32(first), jnp.asarray(g), d, jnp.asarray(indices), plan)
    given = np.array([first], np.int32), g, np.asarray(d), indices
    found = sparse_bounds_sm90.bounds(
        *given, keys=plan.keys, **plan.sizes(), sms=4, threads=128, run=simt_floats.simulate
    )
    np.testing.assert_array_equal(found, twin)
    want = np.zeros(batch * keys)
    for t in range(first, first + window):
        for k, s in enumerate(indices[t][indices[t] < keys]):
            key = t // queries * keys + s
            bound = np.abs(g[t] * d[t, k])
            want[key] = np.maximum(want[key], bound)  # NaN stays
    if first == 0:
        assert np.isnan(want).sum() == 40
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"index_heads": 32}, "I = 32"),
        ({"index_width": 64}, "H = 64"),
        ({"index_width": 128, "width": 72}, "C\\+R = 72"),
        ({"index_width": 128, "width": 640}, "C\\+R = 640"),
    ],
)
def test_unsupported(change, word):
    iq, ik, iw, q, kv, lse, indices = arguments(1, 1, 10, 1, 3, **change)
    with pytest.raises(UnsupportedError, match=word):
        indexer_kl_sparse(
            iq, ik, iw, q, kv, lse, Selection(indices), scale=SCALE, implementation="mosaic"
        )


def test_lowers_for_cuda_without_a_gpu():
    """Value and gradient, plain and sharded over a mesh; the target is built once."""
    *arrays, indices = arguments(2, 6, 90, 16, 20, index_width=128)

    def loss(indexer, target, indices):
        (iq, ik, iw), (q, kv, lse) = indexer, target
        return indexer_kl_sparse(
            iq, ik, iw, q, kv, lse, Selection(indices), scale=SCALE, implementation="mosaic"
        ).sum()

    inputs = tuple(arrays[:3]), tuple(arrays[3:]), indices
    value = jax.jit(loss).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    targets = value.count("indexer_loss_pairs")
    assert targets
    assert not value.count("indexer_loss_gradient")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    op = jax.value_and_grad(loss)

    def sharded(*inputs):
        value, gradient = op(*inputs)
        return jax.lax.psum(value, "data"), gradient

    shards = jax.shard_map(
        sharded, mesh=mesh, in_specs=spec, out_specs=(jax.sharding.PartitionSpec(), spec)
    )
    for fn in (op, shards):
        text = jax.jit(fn).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("indexer_loss_pairs") == targets
        assert text.count("indexer_loss_gradient")
