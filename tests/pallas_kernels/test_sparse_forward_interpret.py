"""The forward kernel of sparse attention in GPU interpret mode with race detection (ring 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Selection, UnsupportedError, sparse_attention
from pallas_kernels.sparse_attention import forward_sm90, reference

# out is bf16 (2**-9 of a value of size about 1), and P is rounded to bf16 before P V.
OUT = 2**-7
LSE = 2e-6  # fp32

CASES = {  # B, T, S, N, C, R, K, growth, CTAs, sweep
    # One CTA, so that queries follow each other through the ring; more keys than fit its slots.
    "a query after the other": (1, 3, 300, 64, 256, 64, 256, 0, 1, True),
    "batch, both halves of the heads": (2, 1, 100, 128, 256, 64, 64, 0, 2, False),
    # From the first keys to the last the scores grow by more than the exponent of fp32 spans.
    "growing scores, no tail, heads padded, K off the tile": (
        (1, 3, 300, 16, 256, 0, 270, 2560, 1, False)
    ),
}


def arguments(batch, queries, keys, heads, latent, rope, selected, growth, seed=0):
    """Rows with all, no, one and some keys, with indices outside the keys among them."""
    rng = np.random.default_rng(seed)
    width = latent + rope
    q = jnp.asarray(rng.standard_normal((batch, queries, heads, width)), jnp.bfloat16)
    kv = rng.standard_normal((batch, keys, width))
    if growth:
        q, kv[..., 0] = q.at[..., 0].set(8), np.linspace(0, growth / 8, keys)
    indices = np.full((batch, queries, selected), -1, np.int32)
    for row, (b, t) in enumerate(np.ndindex(batch, queries)):
        count = [selected, selected // 2 + 3, 0, 1][row % 4]
        indices[b, t, :count] = np.sort(rng.permutation(keys - 1)[:count])
    indices[0, 0, 5], indices[0, 0, 9] = keys, -7
    kv[:, keys - 1] = np.nan  # which no query selects
    return q, jnp.asarray(kv, jnp.bfloat16), jnp.asarray(indices)


@pytest.mark.parametrize("name", CASES)
def test_forward(name):
    *sizes, ctas, sweep = CASES[name]
    latent = sizes[4]
    q, kv, indices = arguments(*sizes)
    out, lse = forward_sm90.forward(
        q, kv, indices, value_width=latent, scale=0.1,
        sms=ctas, sweep=sweep, interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    assert not interpret_pallas_call.get_races().races_found
    expected, expected_lse = reference.forward(
        q.astype(jnp.float32), kv.astype(jnp.float32), indices,
        value_width=latent, scale=0.1, workspace_bytes=2**30,
    )  # fmt: skip
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=OUT, atol=OUT)
    np.testing.assert_allclose(lse, expected_lse, rtol=LSE, atol=LSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"value_width": 192}, "value_width is 192"),
        ({"width": 300}, "300 columns"),
    ],
)
def test_unsupported(changes, message):
    settings = {"dtype": jnp.bfloat16, "value_width": 256, "width": 320, **changes}
    q = jnp.zeros((1, 1, 64, settings["width"]), settings["dtype"])
    kv = jnp.zeros((1, 8, settings["width"]), settings["dtype"])
    options = {"value_width": settings["value_width"], "scale": 0.1}
    selection = Selection(jnp.zeros((1, 1, 4), jnp.int32))
    with pytest.raises(UnsupportedError, match=message):
        sparse_attention(q, kv, selection, **options, implementation="mosaic")


def test_lowers_without_a_gpu():
    def attend(q, kv, indices):
        options = {"value_width": 512, "scale": 0.1, "implementation": "mosaic"}
        return sparse_attention(q, kv, Selection(indices), **options)

    q = jax.ShapeDtypeStruct((2, 5, 128, 576), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 1000, 576), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((2, 5, 100), jnp.int32)
    lowered = jax.jit(attend).trace(q, kv, indices).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
