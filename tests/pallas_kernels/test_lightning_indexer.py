"""The indexer's scores, their gradient, and the fused selection."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import oracle
import pytest

from pallas_kernels import KeyRange, indexer_scores, lightning_indexer, select_topk

# fp32 sums of a few dozen terms of size about 1: a few units of 2**-24, times a margin.
FP32 = {"rtol": 2e-5, "atol": 5e-6}


@pytest.mark.parametrize(
    ("kind", "workspace_bytes"), op_cases.LAYOUTS, indirect=["workspace_bytes"]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn])
def test_scores(kind, dtype, implementation, workspace_bytes):
    """In every dtype to fp32 rounding: products of bf16 and e4m3 are exact in fp32."""
    case = op_cases.case(kind, dtype)
    k_scale = jnp.exp2(jnp.arange(case.ik.shape[1]) % 5 - 2.0) * jnp.ones((op_cases.B, 1))
    found = indexer_scores(
        case.iq,
        case.ik,
        case.iw,
        case.ranges,
        k_scale=k_scale,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    expected = oracle.indexer_scores(case.iq, case.ik, case.iw, case.ranges, k_scale)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, **FP32)


@pytest.mark.parametrize(
    ("kind", "workspace_bytes"), op_cases.LAYOUTS, indirect=["workspace_bytes"]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_scores_gradient(kind, scaled, implementation, workspace_bytes):
    case = op_cases.case(kind, seed=1)
    rng = np.random.default_rng(2)
    keys = case.ik.shape[1]
    g = rng.standard_normal((op_cases.B, op_cases.T, keys))
    g *= np.asarray(case.ranges.mask(keys))
    arguments = [case.iq, case.ik, case.iw]
    if scaled:
        arguments.append(jnp.asarray(rng.uniform(0.5, 2.0, (op_cases.B, keys)), jnp.float32))

    def loss(q, k, w, k_scale=None):
        scores = indexer_scores(
            q,
            k,
            w,
            case.ranges,
            k_scale=k_scale,
            workspace_bytes=workspace_bytes,
            implementation=implementation,
        )
        return (jnp.where(jnp.isfinite(scores), scores, 0.0) * g).sum()

    def exact(q, k, w, k_scale=None):
        scores = oracle.indexer_scores(q, k, w, case.ranges, k_scale)
        return (np.where(np.isfinite(scores), scores, 0.0) * g).sum()

    found = jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments)))))(*arguments)
    # The scores are piecewise trilinear: central differences are exact but for a kink of relu
    # within the step, which these seeds do not have.
    oracle.assert_gradients(found, exact, *arguments, **FP32)


def test_gradient_is_zero_where_relu_is_flat(implementation):
    """A key that a head rejects exactly (dot product 0) takes and gives no gradient."""
    q, k = jnp.zeros((1, 2, 1, 4)), jnp.ones((1, 2, 4))
    ranges = KeyRange.causal(1, 2)

    def loss(q, k):
        scores = indexer_scores(q, k, jnp.ones((1, 2, 1)), ranges, implementation=implementation)
        return jnp.where(jnp.isfinite(scores), scores, 0.0).sum()

    for g in jax.grad(loss, argnums=(0, 1))(q, k):
        np.testing.assert_array_equal(g, 0.0)


@pytest.mark.parametrize(
    ("kind", "workspace_bytes"), op_cases.LAYOUTS, indirect=["workspace_bytes"]
)
def test_selection_is_the_topk_of_the_scores(kind, implementation, workspace_bytes):
    """On whole numbers every sum is exact in any order: the selection must be equal bit for bit.

    Small whole numbers also tie all over, most of all on the zeros that relu makes.
    """
    case = op_cases.case(kind, seed=5)
    whole = [jnp.round(x) for x in (case.iq, case.ik, case.iw)]
    found = lightning_indexer(
        *whole,
        case.ranges,
        topk=op_cases.K,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    scores = oracle.indexer_scores(*whole, case.ranges)
    expected = oracle.select_topk(scores, case.ranges, op_cases.K)
    np.testing.assert_array_equal(found.indices, expected)
    cut = np.sort(np.where(np.isfinite(scores), scores, -1e9), axis=-1)
    assert (cut[..., -op_cases.K] == cut[..., -op_cases.K - 1]).any(), "no tie at a cut"
    assert (np.asarray(found.indices) == -1).any(), "no row with fewer than K keys"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_selection_of_real_scores(dtype, implementation):
    """What is selected scores at least as much as what is not, up to fp32 rounding of a score."""
    rng = np.random.default_rng(6)
    batch, queries, keys, topk = 1, 24, 200, 16
    q = jnp.asarray(rng.standard_normal((batch, queries, 8, 32)), jnp.float32).astype(dtype)
    k = jnp.asarray(rng.standard_normal((batch, keys, 32)), jnp.float32).astype(dtype)
    w = jnp.asarray(rng.standard_normal((batch, queries, 8)), jnp.float32)
    k_scale = jnp.asarray(rng.uniform(0.5, 2.0, (batch, keys)), jnp.float32)
    ranges = KeyRange.causal(batch, queries, offset=keys - queries - 30)
    selection = lightning_indexer(
        q, k, w, ranges, topk=topk, k_scale=k_scale, implementation=implementation
    )
    scores = oracle.indexer_scores(q, k, w, ranges, k_scale)
    chosen = np.asarray(selection.mask(keys))
    assert (chosen.sum(-1) == topk).all()
    worst = np.where(chosen, scores, np.inf).min(-1)
    best = np.where(chosen, -np.inf, scores).max(-1)
    # Eight products of size up to about 200, each rounded to 2**-24.
    assert (worst >= best - 1e-4).all()
    margin = np.sort(scores, axis=-1)[..., -topk] - np.sort(scores, axis=-1)[..., -topk - 1]
    expected = oracle.select_topk(scores, ranges, topk)
    clear = margin > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(selection.indices)[clear], expected[clear])


def test_negative_weights_can_hide_a_key(implementation):
    """Scores are not positive: a key that only a negative head likes loses to one nobody likes."""
    q = jnp.array([[[[1.0, 0.0], [0.0, 1.0]]]])
    k = jnp.array([[[0.0, 3.0], [-1.0, -1.0], [2.0, 0.0]]])
    w = jnp.array([[[1.0, -1.0]]])
    ranges = KeyRange.causal(1, 1, offset=2)
    scores = indexer_scores(q, k, w, ranges, implementation=implementation)
    np.testing.assert_array_equal(scores, [[[-3.0, 0.0, 2.0]]])
    selection = lightning_indexer(q, k, w, ranges, topk=2, implementation=implementation)
    np.testing.assert_array_equal(selection.indices, [[[1, 2]]])


def test_packed_documents_equal_the_documents_alone(implementation):
    rng = np.random.default_rng(7)
    lengths, topk = [9, 14, 9], 4
    total = sum(lengths)
    q = jnp.asarray(rng.standard_normal((1, total, 3, 8)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((1, total, 8)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((1, total, 3)), jnp.float32)
    ids = jnp.asarray(np.repeat([1, 2, 3], lengths))[None]
    packed = lightning_indexer(
        q, k, w, KeyRange.packed(ids), topk=topk, implementation=implementation
    )
    first = 0
    for length in lengths:
        part = slice(first, first + length)
        alone = lightning_indexer(
            q[:, part],
            k[:, part],
            w[:, part],
            KeyRange.causal(1, length),
            topk=topk,
            implementation=implementation,
        )
        moved = np.where(alone.valid, alone.indices + first, -1)
        np.testing.assert_array_equal(packed.indices[:, part], moved)
        first += length


def test_same_selection_with_and_without_gradient(implementation):
    rng = np.random.default_rng(8)
    x = jnp.asarray(rng.standard_normal((2, 40, 16)), jnp.float32)
    wide = jnp.asarray(rng.standard_normal((16, 4, 8)), jnp.float32)
    ranges = KeyRange.causal(2, 40)

    def forward(x):
        q = jnp.einsum("BTD,DIH->BTIH", x, wide).astype(jnp.bfloat16)
        k = (x @ wide[:, 0]).astype(jnp.bfloat16)
        selection = lightning_indexer(
            q, k, x[..., :4], ranges, topk=6, implementation=implementation
        )
        picked = jnp.take_along_axis(x, selection.indices[..., :1], axis=1)
        return picked.sum(), selection.indices

    (_, with_gradient), _ = jax.jit(jax.value_and_grad(forward, has_aux=True))(x)
    _, without = jax.jit(forward)(x)
    _, again = jax.jit(forward)(x)
    np.testing.assert_array_equal(with_gradient, without)
    np.testing.assert_array_equal(again, without)


def test_selecting_all_visible_keys(implementation):
    """topk over the keys in sight selects them all, NaN scores included."""
    case = op_cases.case("packed")
    iq = case.iq.at[0, 3].set(jnp.nan)
    ranges, keys = case.ranges, case.ik.shape[1]
    selection = lightning_indexer(
        iq, case.ik, case.iw, ranges, topk=99, implementation=implementation
    )
    assert selection.indices.shape[-1] == keys
    np.testing.assert_array_equal(selection.mask(keys), ranges.mask(keys))
    scores = indexer_scores(iq, case.ik, case.iw, ranges, implementation=implementation)
    again = select_topk(scores, ranges, topk=99, implementation=implementation)
    np.testing.assert_array_equal(selection.indices, again.indices)
