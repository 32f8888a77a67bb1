"""Attention over key ranges, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import oracle
import pytest

from pallas_kernels import KeyRange, dense_attention

# fp32 sums of a few dozen terms of size about 1, through one exp: some units of 2**-24.
FP32 = {"rtol": 2e-5, "atol": 5e-6}


@pytest.mark.parametrize(
    ("kind", "workspace_bytes"), op_cases.LAYOUTS, indirect=["workspace_bytes"]
)
def test_forward(kind, implementation, workspace_bytes):
    case = op_cases.case(kind)
    out, lse = dense_attention(
        case.qd,
        case.k,
        case.v,
        case.ranges,
        scale=op_cases.SCALE,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    expected, expected_lse = oracle.dense_attention(
        case.qd, case.k, case.v, case.ranges, scale=op_cases.SCALE
    )
    np.testing.assert_allclose(out, expected, **FP32)
    np.testing.assert_allclose(lse, expected_lse, **FP32)


@pytest.mark.parametrize(
    ("kind", "workspace_bytes"), op_cases.LAYOUTS, indirect=["workspace_bytes"]
)
def test_gradient(kind, implementation, workspace_bytes):
    """Through out and lse; rows without keys, of which packed and ragged have some, are in it."""
    case = op_cases.case(kind, seed=1)
    rng = np.random.default_rng(2)
    dout = rng.standard_normal((op_cases.B, op_cases.T, op_cases.N, op_cases.V))
    dlse = rng.standard_normal(dout.shape[:3])

    def total(out, lse, where):
        return (out * dout).sum() + (where(lse > -np.inf, lse, 0.0) * dlse).sum()

    def loss(q, k, v):
        results = dense_attention(
            q,
            k,
            v,
            case.ranges,
            scale=op_cases.SCALE,
            workspace_bytes=workspace_bytes,
            implementation=implementation,
        )
        return total(*results, jnp.where)

    def exact(q, k, v):
        return total(*oracle.dense_attention(q, k, v, case.ranges, scale=op_cases.SCALE), np.where)

    arguments = (case.qd, case.k, case.v)
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    oracle.assert_gradients(found, exact, *arguments, **FP32)


def test_bf16(implementation):
    case = op_cases.case("packed", jnp.bfloat16)
    rng = np.random.default_rng(3)
    dout = jnp.asarray(
        rng.standard_normal((op_cases.B, op_cases.T, op_cases.N, op_cases.V)), jnp.bfloat16
    )
    arguments = (case.qd, case.k, case.v)

    def forward(q, k, v):
        return dense_attention(
            q, k, v, case.ranges, scale=op_cases.SCALE, implementation=implementation
        )

    def exact(q, k, v):
        return oracle.dense_attention(q, k, v, case.ranges, scale=op_cases.SCALE)

    (out, lse), pull = jax.vjp(forward, *arguments)
    found = pull((dout, jnp.zeros_like(lse)))
    expected, expected_lse = exact(*arguments)
    assert out.dtype == jnp.bfloat16
    assert all(g.dtype == jnp.bfloat16 for g in found)
    # out is at most about 3 and is rounded once to 8 bits; a kernel may round the weights as well.
    np.testing.assert_allclose(oracle.f64(out), expected, rtol=2**-7, atol=2**-7)
    # The inputs are exact and lse stays in fp32.
    np.testing.assert_allclose(lse, expected_lse, **FP32)
    # Gradients are sums of a few products of size about 1 with out rounded to 8 bits among the
    # factors, rounded once more at the end.
    oracle.assert_gradients(
        found,
        lambda *x: (exact(*x)[0] * oracle.f64(dout)).sum(),
        *arguments,
        rtol=2**-6,
        atol=2**-5,
    )


def test_rows_without_keys(implementation):
    case = op_cases.case("ragged")
    ranges = KeyRange(case.ranges.start, case.ranges.end.at[1].set(-5))

    def forward(q, k, v):
        return dense_attention(q, k, v, ranges, scale=op_cases.SCALE, implementation=implementation)

    (out, lse), pull = jax.vjp(forward, case.qd, case.k, case.v)
    np.testing.assert_array_equal(out[1], 0.0)
    np.testing.assert_array_equal(lse[1], -jnp.inf)
    for g in pull((jnp.ones_like(out), jnp.full_like(lse, 3.0))):
        np.testing.assert_array_equal(g[1], 0.0)
        assert np.isfinite(g).all()
        assert (g[0] != 0).any()


def test_packed_documents_equal_the_documents_alone(implementation):
    """Forward and backward, down to rounding: another document changes nothing."""
    rng = np.random.default_rng(4)
    length = 7
    q, k = (jnp.asarray(rng.standard_normal((1, 2 * length, 2, 5)), jnp.float32) for _ in "qk")
    v = jnp.asarray(rng.standard_normal((1, 2 * length, 2, 3)), jnp.float32)
    ids = jnp.asarray(np.repeat([1, 2], length))[None]

    def run(q, k, v, ranges):
        def forward(q, k, v):
            return dense_attention(q, k, v, ranges, scale=0.5, implementation=implementation)

        results, pull = jax.vjp(forward, q, k, v)
        return *results, *pull(jax.tree.map(jnp.ones_like, results))

    packed = run(q, k, v, KeyRange.packed(ids))
    for part in (slice(0, length), slice(length, 2 * length)):
        alone = run(q[:, part], k[:, part], v[:, part], KeyRange.causal(1, length))
        for a, b in zip(packed, alone, strict=True):
            np.testing.assert_allclose(a[:, part], b, **FP32)
