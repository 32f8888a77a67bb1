"""Attention over selected keys, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import oracle
import pytest

from pallas_kernels import KeyRange, Selection, dense_attention, sparse_attention

OPTIONS = {"value_width": op_cases.C, "scale": op_cases.SCALE}

# fp32 sums of a few dozen terms of size about 1, through one exp: some units of 2**-24.
FP32 = {"rtol": 2e-5, "atol": 5e-6}


def run(q, kv, indices, **options):
    return sparse_attention(q, kv, Selection(indices), **OPTIONS, **options)


@pytest.mark.parametrize(
    ("kind", "workspace_bytes"), op_cases.LAYOUTS, indirect=["workspace_bytes"]
)
def test_forward(kind, implementation, workspace_bytes):
    case = op_cases.case(kind)
    indices = case.selection.indices
    out, lse = run(
        case.q, case.kv, indices, workspace_bytes=workspace_bytes, implementation=implementation
    )
    expected, expected_lse = oracle.sparse_attention(case.q, case.kv, indices, **OPTIONS)
    np.testing.assert_allclose(out, expected, **FP32)
    np.testing.assert_allclose(lse, expected_lse, **FP32)


@pytest.mark.parametrize(
    ("kind", "workspace_bytes"), op_cases.LAYOUTS, indirect=["workspace_bytes"]
)
def test_gradient(kind, implementation, workspace_bytes):
    """Through out and lse; rows without keys, of which packed and ragged have some, are in it."""
    case = op_cases.case(kind, seed=1)
    indices = case.selection.indices
    rng = np.random.default_rng(2)
    dout = rng.standard_normal((op_cases.B, op_cases.T, op_cases.N, op_cases.C))
    dlse = rng.standard_normal(dout.shape[:3])

    def total(out, lse, where):
        return (out * dout).sum() + (where(lse > -np.inf, lse, 0.0) * dlse).sum()

    def loss(q, kv):
        options = {"workspace_bytes": workspace_bytes, "implementation": implementation}
        return total(*run(q, kv, indices, **options), jnp.where)

    def exact(q, kv):
        return total(*oracle.sparse_attention(q, kv, indices, **OPTIONS), np.where)

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(case.q, case.kv)
    oracle.assert_gradients(found, exact, case.q, case.kv, **FP32)


def test_bf16(implementation):
    case = op_cases.case("packed", jnp.bfloat16)
    indices = case.selection.indices
    rng = np.random.default_rng(3)
    dout = jnp.asarray(
        rng.standard_normal((op_cases.B, op_cases.T, op_cases.N, op_cases.C)), jnp.bfloat16
    )

    def forward(q, kv):
        return run(q, kv, indices, implementation=implementation)

    (out, lse), pull = jax.vjp(forward, case.q, case.kv)
    found = pull((dout, jnp.zeros_like(lse)))
    expected, expected_lse = oracle.sparse_attention(case.q, case.kv, indices, **OPTIONS)
    assert out.dtype == found[0].dtype == found[1].dtype == jnp.bfloat16
    # out is at most about 3 and is rounded once to 8 bits; a kernel may round the weights as well.
    np.testing.assert_allclose(oracle.f64(out), expected, rtol=2**-7, atol=2**-7)
    # The inputs are exact and lse stays in fp32.
    np.testing.assert_allclose(lse, expected_lse, **FP32)

    def exact(q, kv):
        return (oracle.sparse_attention(q, kv, indices, **OPTIONS)[0] * oracle.f64(dout)).sum()

    # Gradients are sums of a few products of size about 1 with out rounded to 8 bits among the
    # factors, rounded once more at the end.
    oracle.assert_gradients(found, exact, case.q, case.kv, rtol=2**-6, atol=2**-5)


def test_rows_without_keys(implementation):
    """out 0, lse -inf, and no gradient: neither NaN nor anything else, whatever flows in."""
    case = op_cases.case("packed")
    indices = case.selection.indices.at[1].set(-1)
    options = {"implementation": implementation}
    (out, lse), pull = jax.vjp(lambda q, kv: run(q, kv, indices, **options), case.q, case.kv)
    np.testing.assert_array_equal(out[1], 0.0)
    np.testing.assert_array_equal(lse[1], -jnp.inf)
    dq, dkv = pull((jnp.ones_like(out), jnp.full_like(lse, 3.0)))
    np.testing.assert_array_equal(dq[1], 0.0)
    np.testing.assert_array_equal(dkv[1], 0.0)
    assert np.isfinite(dq).all()
    assert np.isfinite(dkv).all()
    assert (np.abs(dkv[0]).sum(-1) > 0).any()


def test_rows_that_are_not_selected_are_not_used(implementation, workspace_bytes):
    """A poisoned key, key 0 and the last key among them, must not leak out of a masked slot."""
    case = op_cases.case("packed")
    keys = case.kv.shape[1]
    used = np.asarray(case.selection.mask(keys)).any(axis=1)
    used[:, [0, keys - 1]] = False
    indices = jnp.where(
        jnp.isin(case.selection.indices, jnp.array([0, keys - 1])), -1, case.selection.indices
    )
    poisoned = jnp.where(jnp.asarray(used)[..., None], case.kv, jnp.nan)
    options = {"implementation": implementation, "workspace_bytes": workspace_bytes}

    def loss(q, kv):
        out, lse = run(q, kv, indices, **options)
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0.0).sum()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(case.q, poisoned)
    clean, clean_gradients = jax.value_and_grad(loss, argnums=(0, 1))(case.q, case.kv)
    np.testing.assert_array_equal(value, clean)
    for a, b in zip(gradients, clean_gradients, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(gradients[1][~used], 0.0)


@pytest.mark.parametrize("outside", [-2, -(2**31), 13, 14, 2**31 - 1])
def test_indices_outside_the_keys_are_ignored(outside, implementation):
    case = op_cases.case("packed")
    assert case.kv.shape[1] == 13
    indices = case.selection.indices
    odd = jnp.where(indices < 0, outside, indices)
    assert (odd != indices).any()

    def both(indices):
        options = {"implementation": implementation}
        results, pull = jax.vjp(lambda q, kv: run(q, kv, indices, **options), case.q, case.kv)
        return *results, *pull(jax.tree.map(jnp.ones_like, results))

    for a, b in zip(both(indices), both(odd), strict=True):
        np.testing.assert_array_equal(a, b)


def test_large_scores_do_not_overflow(implementation):
    case = op_cases.case("prefix")
    options = {"implementation": implementation}
    (out, lse), pull = jax.vjp(
        lambda q: run(q, case.kv, case.selection.indices, **options), 1e4 * case.q
    )
    expected, expected_lse = oracle.sparse_attention(
        1e4 * case.q, case.kv, case.selection.indices, **OPTIONS
    )
    # A score is a sum of terms of up to 5e4, so its fp32 rounding is about 2**-24 * 8 * 5e4 = 0.02
    # also where the terms cancel; the weights have that in their exponent.
    np.testing.assert_allclose(lse, expected_lse, atol=0.02)
    np.testing.assert_allclose(out, expected, atol=0.05)
    assert np.isfinite(pull((jnp.ones_like(out), jnp.ones_like(lse)))[0]).all()


def test_equals_dense_attention_when_all_keys_are_selected(implementation):
    """With every visible key selected and one key head repeated, both ops are one."""
    case = op_cases.case("packed", seed=4)
    keys = case.kv.shape[1]
    order = jnp.broadcast_to(jnp.arange(keys), (op_cases.B, op_cases.T, keys))
    everything = jnp.sort(jnp.where(case.ranges.mask(keys), order, keys), axis=-1)
    everything = jnp.where(everything == keys, -1, everything).astype(jnp.int32)

    def sparse(q, kv):
        return run(q, kv, everything, implementation=implementation)

    def dense(q, kv):
        k = jnp.repeat(kv[:, :, None], op_cases.N, axis=2)
        return dense_attention(
            q,
            k,
            k[..., : op_cases.C],
            case.ranges,
            scale=op_cases.SCALE,
            implementation=implementation,
        )

    a, pull_a = jax.vjp(sparse, case.q, case.kv)
    b, pull_b = jax.vjp(dense, case.q, case.kv)
    gradients = jax.tree.map(jnp.ones_like, a)
    for x, y in zip((*a, *pull_a(gradients)), (*b, *pull_b(gradients)), strict=True):
        np.testing.assert_allclose(x, y, **FP32)


def test_bit_equal_between_runs(implementation):
    """Many queries add into the same few keys; on CPU the order of the sum is fixed."""
    if jax.default_backend() != "cpu":
        pytest.skip("the scatter-add of XLA on a GPU has no fixed order")
    rng = np.random.default_rng(5)
    q = jnp.asarray(rng.standard_normal((1, 200, 2, 8)), jnp.float32)
    kv = jnp.asarray(rng.standard_normal((1, 12, 8)), jnp.float32)
    ranges = KeyRange(jnp.zeros((1, 200), jnp.int32), jnp.full((1, 200), 12, jnp.int32))
    indices = op_cases.random_selection(ranges, 12, rng).indices

    @jax.jit
    def gradient(q, kv):
        return jax.grad(
            lambda q, kv: (run(q, kv, indices, implementation=implementation)[0] ** 2).sum(),
            argnums=(0, 1),
        )(q, kv)

    first = gradient(q, kv)
    for _ in range(4):
        for a, b in zip(first, gradient(q, kv), strict=True):
            np.testing.assert_array_equal(a, b)
