"""The two divergences that the indexer learns from."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import oracle
import pytest

from pallas_kernels import (
    KeyRange,
    Selection,
    dense_attention,
    indexer_kl_dense,
    indexer_kl_sparse,
    sparse_attention,
)

SCALE = op_cases.SCALE

# fp32 sums of a few dozen terms; logarithms of probabilities reach 20, so the absolute error is
# that of numbers of that size.
FP32 = {"rtol": 3e-5, "atol": 2e-5}


def dense_lse(case):
    return dense_attention(case.qd, case.k, case.v, case.ranges, scale=SCALE)[1]


def sparse_lse(case):
    return sparse_attention(case.q, case.kv, case.selection, value_width=op_cases.C, scale=SCALE)[1]


def loss_of(stage, case, **options):
    """The op on a case, as a function of the indexer alone, and the same from the oracle."""
    if stage == "dense":
        lse = dense_lse(case)

        def found(iq, ik, iw):
            return indexer_kl_dense(
                iq, ik, iw, case.qd, case.k, lse, case.ranges, scale=SCALE, **options
            )

        def exact(iq, ik, iw):
            return oracle.indexer_kl_dense(iq, ik, iw, case.qd, case.k, case.ranges, scale=SCALE)
    else:
        lse = sparse_lse(case)

        def found(iq, ik, iw):
            return indexer_kl_sparse(
                iq, ik, iw, case.q, case.kv, lse, case.selection, scale=SCALE, **options
            )

        def exact(iq, ik, iw):
            return oracle.indexer_kl_sparse(
                iq, ik, iw, case.q, case.kv, case.selection.indices, scale=SCALE
            )

    return found, exact


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("kind", "workspace_bytes"), op_cases.LAYOUTS, indirect=["workspace_bytes"]
)
def test_value_and_gradient(stage, kind, implementation, workspace_bytes):
    case = op_cases.case(kind, seed=1)
    options = {"implementation": implementation, "workspace_bytes": workspace_bytes}
    found, exact = loss_of(stage, case, **options)
    indexer = (case.iq, case.ik, case.iw)
    g = np.random.default_rng(2).standard_normal((op_cases.B, op_cases.T))
    kl, pull = jax.vjp(jax.jit(found), *indexer)
    np.testing.assert_allclose(kl, exact(*indexer), **FP32)
    assert (np.asarray(kl) > 0.1).mean() > 0.5  # not a test of zeros
    gradients = pull(jnp.asarray(g, jnp.float32))
    oracle.assert_gradients(gradients, lambda *x: (exact(*x) * g).sum(), *indexer, **FP32)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_bf16(stage, implementation):
    """bf16 inputs are exact and the rest is fp32, so only the gradients' last rounding is bf16."""
    case = op_cases.case("packed", jnp.bfloat16)
    found, exact = loss_of(stage, case, implementation=implementation)
    indexer = (case.iq, case.ik, case.iw)
    kl, pull = jax.vjp(found, *indexer)
    np.testing.assert_allclose(kl, exact(*indexer), **FP32)
    gradients = pull(jnp.ones_like(kl))
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    oracle.assert_gradients(gradients, lambda *x: exact(*x).sum(), *indexer, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_gradient_goes_to_the_indexer_only(stage, implementation):
    """Exactly zero to the attention's side, lse and the detached inputs it came from included."""
    case = op_cases.case("packed")

    def loss(q, keys):
        if stage == "dense":
            _, lse = dense_attention(q, keys, case.v, case.ranges, scale=SCALE)
            kl = indexer_kl_dense(
                case.iq,
                case.ik,
                case.iw,
                q,
                keys,
                lse,
                case.ranges,
                scale=SCALE,
                implementation=implementation,
            )
        else:
            _, lse = sparse_attention(q, keys, case.selection, value_width=op_cases.C, scale=SCALE)
            kl = indexer_kl_sparse(
                case.iq,
                case.ik,
                case.iw,
                q,
                keys,
                lse,
                case.selection,
                scale=SCALE,
                implementation=implementation,
            )
        return kl.sum()

    arguments = (case.qd, case.k) if stage == "dense" else (case.q, case.kv)
    for g in jax.grad(loss, argnums=(0, 1))(*arguments):
        np.testing.assert_array_equal(g, 0.0)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_rows_without_keys(stage, implementation):
    case = op_cases.case("packed")
    ranges = KeyRange(case.ranges.start, case.ranges.end.at[1].set(0))
    selection = Selection(case.selection.indices.at[1].set(-1))
    case = case._replace(ranges=ranges, selection=selection)
    found, _ = loss_of(stage, case, implementation=implementation)
    kl, pull = jax.vjp(found, case.iq, case.ik, case.iw)
    np.testing.assert_array_equal(kl[1], 0.0)
    np.testing.assert_array_equal(kl[0, -2:], 0.0)  # padding
    for g in pull(jnp.ones_like(kl)):
        assert np.isfinite(g).all()
        np.testing.assert_array_equal(g[1], 0.0)
        assert (g[0] != 0).any()


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_zero_when_the_indexer_agrees(stage, implementation):
    """One attention head whose scores the indexer repeats: no divergence and no gradient."""
    rng = np.random.default_rng(3)
    queries, width = 11, 6
    # Positive vectors, so that relu lets every dot product through.
    q = jnp.asarray(rng.uniform(0.1, 1.0, (1, queries, 1, width)), jnp.float32)
    k = jnp.asarray(rng.uniform(0.1, 1.0, (1, queries, width)), jnp.float32)
    w = jnp.full((1, queries, 1), SCALE)
    ranges = KeyRange.causal(1, queries)
    if stage == "dense":
        _, lse = dense_attention(q, k[:, :, None], k[:, :, None], ranges, scale=SCALE)

        def run(iq, ik, iw):
            return indexer_kl_dense(
                iq,
                ik,
                iw,
                q,
                k[:, :, None],
                lse,
                ranges,
                scale=SCALE,
                implementation=implementation,
            )
    else:
        selection = op_cases.random_selection(ranges, queries, rng)
        _, lse = sparse_attention(q, k, selection, value_width=width, scale=SCALE)

        def run(iq, ik, iw):
            return indexer_kl_sparse(
                iq, ik, iw, q, k, lse, selection, scale=SCALE, implementation=implementation
            )

    kl, pull = jax.vjp(run, q, k, w)
    np.testing.assert_allclose(kl, 0.0, atol=1e-6)  # fp32 rounding of terms of size 1
    for g in pull(jnp.ones_like(kl)):
        np.testing.assert_allclose(g, 0.0, atol=2e-6)
    assert (np.asarray(run(q, k, -w)) > 1e-2).any()


def test_targets_far_below_any_epsilon(implementation):
    """Where the indexer all but forbids a key, log softmax says by how much; an epsilon would not.

    Key 1 has target 0.5, and its indexer score lies 200 below: the divergence is about 100 nats.
    """
    q = jnp.zeros((1, 1, 1, 2))
    k = jnp.zeros((1, 2, 1, 2))
    ranges = KeyRange.causal(1, 1, offset=1)
    lse = jnp.full((1, 1, 1), jnp.log(2.0))
    iq, iw = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1, 1))
    ik = jnp.array([[[200.0], [0.0]]])
    kl, pull = jax.vjp(
        lambda ik: indexer_kl_dense(
            iq, ik, iw, q, k, lse, ranges, scale=1.0, implementation=implementation
        ),
        ik,
    )
    np.testing.assert_allclose(kl, 100.0 - np.log(2.0), rtol=1e-6)
    # softmax - p is +-0.5; relu is flat at 0 for the forbidden key.
    np.testing.assert_allclose(pull(jnp.ones_like(kl))[0], [[[0.5], [0.0]]], rtol=1e-6)


def test_underflowed_targets_count_as_nothing(implementation):
    """A key whose attention underflows to 0 in fp32 adds 0 to the divergence, not NaN."""
    q = jnp.array([[[[300.0]]]])
    k = jnp.array([[[[1.0]], [[0.0]], [[1.0]]]])
    ranges = KeyRange.causal(1, 1, offset=2)
    lse = jnp.full((1, 1, 1), 300.0 + np.log(2.0), jnp.float32)
    iq, iw = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1, 1))
    ik = jnp.array([[[1.0], [2.0], [3.0]]])
    kl = indexer_kl_dense(iq, ik, iw, q, k, lse, ranges, scale=1.0, implementation=implementation)
    log_q = np.array([1.0, 2.0, 3.0]) - np.log(np.exp([1.0, 2.0, 3.0]).sum())
    np.testing.assert_allclose(kl[0, 0], -np.log(2) - log_q[[0, 2]].mean(), rtol=1e-5)


def test_sparse_equals_dense_when_all_keys_are_selected(implementation):
    case = op_cases.case("packed", seed=4)
    keys = case.kv.shape[1]
    order = jnp.broadcast_to(jnp.arange(keys), (op_cases.B, op_cases.T, keys))
    everything = jnp.sort(jnp.where(case.ranges.mask(keys), order, keys), axis=-1)
    everything = jnp.where(everything == keys, -1, everything).astype(jnp.int32)
    case = case._replace(selection=Selection(everything))
    k = jnp.repeat(case.kv[:, :, None], op_cases.N, axis=2)
    sparse, _ = loss_of("sparse", case, implementation=implementation)
    dense, _ = loss_of("dense", case._replace(qd=case.q, k=k), implementation=implementation)
    indexer = (case.iq, case.ik, case.iw)
    a, pull_a = jax.vjp(sparse, *indexer)
    b, pull_b = jax.vjp(dense, *indexer)
    for x, y in zip((a, *pull_a(jnp.ones_like(a))), (b, *pull_b(jnp.ones_like(b))), strict=True):
        np.testing.assert_allclose(x, y, **FP32)


def test_the_target_is_the_softmax_over_the_selection():
    """Not the dense softmax cut to the selection: that weighs heads by what they leave outside.

    Two heads, two selected keys of three. Each head looks at one selected key; head 0 looks at the
    unselected key even more. Over the selection both heads count alike, so p = (1/2, 1/2).
    """
    q = jnp.array([[[[1.0, 0.0, 3.0], [0.0, 1.0, 0.0]]]]) * 20
    kv = jnp.eye(3)[None]
    selection = Selection(jnp.array([[[0, 1]]], jnp.int32))
    _, lse = sparse_attention(q, kv, selection, value_width=1, scale=1.0)
    iq, ik, iw = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 3, 1)), jnp.ones((1, 1, 1))
    kl = indexer_kl_sparse(iq, ik, iw, q, kv, lse, selection, scale=1.0)
    np.testing.assert_allclose(kl, 0.0, atol=1e-6)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_bit_equal_between_runs(stage, implementation):
    if jax.default_backend() != "cpu" and stage == "sparse" and implementation == "xla":
        pytest.skip("the scatter-add of XLA on a GPU has no fixed order")
    case = op_cases.case("prefix", seed=6)
    found, _ = loss_of(stage, case, implementation=implementation)

    @jax.jit
    def both(*indexer):
        kl, pull = jax.vjp(found, *indexer)
        return kl, *pull(jnp.ones_like(kl))

    first = both(case.iq, case.ik, case.iw)
    for _ in range(4):
        for a, b in zip(first, both(case.iq, case.ik, case.iw), strict=True):
            np.testing.assert_array_equal(a, b)
