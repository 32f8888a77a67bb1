"""What an op refuses: the error names the argument, the value, the rule and a way out."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as ops
from pallas_kernels import Fp8Pages, KeyRange, Selection, UnsupportedError

B, T, S, I, H, N, P, V, C, R, K = 2, 3, 5, 2, 4, 2, 6, 3, 8, 4, 2


def good():
    """Valid keyword arguments of every op."""
    iq, ik = jnp.ones((B, T, I, H)), jnp.ones((B, S, H))
    iw = jnp.ones((B, T, I))
    q, kv = jnp.ones((B, T, N, C + R)), jnp.ones((B, S, C + R))
    qd, k, v = jnp.ones((B, T, N, P)), jnp.ones((B, S, N, P)), jnp.ones((B, S, N, V))
    lse = jnp.zeros((B, T, N))
    ranges = KeyRange.causal(B, T, offset=S - T)
    selection = Selection(jnp.zeros((B, T, K), jnp.int32))
    scores = {"q": iq, "k": ik, "w": iw, "ranges": ranges, "k_scale": jnp.ones((B, S))}
    return {
        "lightning_indexer": {**scores, "topk": K},
        "indexer_scores": scores,
        "select_topk": {"scores": jnp.zeros((B, T, S)), "ranges": ranges, "topk": K},
        "sparse_attention": {
            "q": q,
            "kv": kv,
            "selection": selection,
            "value_width": C,
            "scale": 1.0,
        },
        "sparse_attention_decode": {
            "q": q,
            "pages": jnp.ones((3, 2, C + R)),
            "slots": selection.indices,
            "value_width": C,
            "scale": 1.0,
        },
        "dense_attention": {"q": qd, "k": k, "v": v, "ranges": ranges, "scale": 1.0},
        "indexer_kl_dense": {
            "iq": iq,
            "ik": ik,
            "iw": iw,
            "q": qd,
            "k": k,
            "lse": lse,
            "ranges": ranges,
            "scale": 1.0,
        },
        "indexer_kl_sparse": {
            "iq": iq,
            "ik": ik,
            "iw": iw,
            "q": q,
            "kv": kv,
            "lse": lse,
            "selection": selection,
            "scale": 1.0,
        },
    }


OPS = list(good())


def call(name, **changes):
    return getattr(ops, name)(**{**good()[name], **changes})


@pytest.mark.parametrize("name", OPS)
def test_good_arguments_pass(name):
    jax.eval_shape(lambda: call(name))


# select_topk's kernel serves good arguments; what it refuses stands in its own tests.
@pytest.mark.parametrize("name", [name for name in OPS if name != "select_topk"])
def test_mosaic_says_why_it_cannot(name):
    with pytest.raises(UnsupportedError, match=f"{name}: implementation='mosaic' cannot serve"):
        call(name, implementation="mosaic")


@pytest.mark.parametrize("name", OPS)
def test_unknown_implementation(name):
    with pytest.raises(ValueError, match=f"{name}: implementation='triton' is not one of"):
        call(name, implementation="triton")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("workspace_bytes", [0, -1, 1.5])
def test_workspace(name, workspace_bytes):
    with pytest.raises((ValueError, TypeError), match=f"{name}: workspace_bytes={workspace_bytes}"):
        call(name, workspace_bytes=workspace_bytes)


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


BAD = [
    ("lightning_indexer", {"topk": 0}, ValueError, "topk=0 must be at least 1"),
    ("select_topk", {"topk": -3}, ValueError, "topk=-3 must be at least 1"),
    ("lightning_indexer", {"topk": 2.0}, TypeError, "topk=2.0 must be a Python int"),
    ("lightning_indexer", {"topk": True}, TypeError, "topk=True must be a Python int"),
    ("lightning_indexer", {"k": ones(B, S, H + 1)}, ValueError, r"k .* H = 5 .* q has H = 4"),
    ("lightning_indexer", {"k": ones(B, S, 1, H)}, ValueError, r"k has shape .*\[B S H\]"),
    ("lightning_indexer", {"k": [1.0]}, TypeError, r"k is \[1.0\], not an array"),
    ("lightning_indexer", {"k_scale": ones(B, S + 1)}, ValueError, "k_scale .* S = 6"),
    ("lightning_indexer", {"w": ones(B, T, I, dtype=jnp.bfloat16)}, TypeError, "w is bfloat16"),
    ("indexer_scores", {"q": ones(B, T, I, H, dtype=jnp.float16)}, TypeError, "q is float16"),
    ("indexer_scores", {"k": ones(B, S, H, dtype=jnp.bfloat16)}, TypeError, "q is float32; they"),
    ("indexer_scores", {"ranges": (0, 1)}, TypeError, "ranges is tuple, not a KeyRange"),
    ("indexer_scores", {"ranges": KeyRange.causal(B, T + 1)}, ValueError, "ranges.start .* T = 4"),
    ("indexer_scores", {"ranges": KeyRange(ones(B, T), ones(B, T))}, TypeError, "ranges.start is"),
    ("indexer_scores", {"ranges": KeyRange(0, 1)}, TypeError, "ranges.start is 0, not an array"),
    ("select_topk", {"scores": ones(B, T, S, dtype=jnp.bfloat16)}, TypeError, "scores is bfloat16"),
    ("select_topk", {"scores": ones(B, T, 0)}, ValueError, "S is 0"),
    ("sparse_attention", {"kv": ones(B, S, C)}, ValueError, r"C\+R = 8 .* q has C\+R = 12"),
    ("sparse_attention", {"selection": ones(B, T, K)}, TypeError, "not a Selection"),
    ("sparse_attention", {"selection": Selection(ones(B, T, K))}, TypeError, "indices is float32"),
    ("sparse_attention", {"value_width": C + R + 1}, ValueError, "value_width=13 .* at most 12"),
    ("sparse_attention", {"scale": 0.0}, ValueError, "scale=0.0 must be positive"),
    ("sparse_attention", {"scale": float("nan")}, ValueError, "scale=nan must be positive"),
    ("sparse_attention", {"scale": ones()}, TypeError, "scale=.* must be a Python float"),
    ("sparse_attention_decode", {"slots": ones(B, T, K)}, TypeError, "slots is float32"),
    ("sparse_attention_decode", {"pages": ones(3, 2, C)}, ValueError, "a row of pages has 8"),
    ("sparse_attention_decode", {"pages": ones(6, C + R)}, ValueError, "pages has shape"),
    ("dense_attention", {"v": ones(B, S, N + 1, V)}, ValueError, "v .* N = 3 .* q has N = 2"),
    ("dense_attention", {"v": ones(B, S, N, V, dtype=jnp.bfloat16)}, TypeError, "v is bfloat16"),
    ("indexer_kl_dense", {"lse": ones(B, T)}, ValueError, r"lse has shape .*\[B T N\]"),
    ("indexer_kl_dense", {"k": ones(B, S + 1, N, P)}, ValueError, "S = 6"),
    ("indexer_kl_sparse", {"kv": ones(B, S + 1, C + R)}, ValueError, "kv .* S = 6 .* ik has S = 5"),
]


@pytest.mark.parametrize(("name", "changes", "error", "message"), BAD)
def test_bad_arguments(name, changes, error, message):
    with pytest.raises(error, match=f"{name}: .*{message}" if name else message):
        call(name, **changes)


def fp8_pages(**changes):
    parts = {
        "latent": ones(3, 2, C, dtype=jnp.float8_e4m3fn),
        "scale": ones(3, 2, 2),
        "rope": ones(3, 2, R, dtype=jnp.bfloat16),
    }
    return Fp8Pages(**{**parts, **changes})


@pytest.mark.parametrize(
    ("pages", "options", "error", "message"),
    [
        (fp8_pages(latent=ones(3, 2, C)), {}, TypeError, "pages.latent is float32"),
        (fp8_pages(scale=ones(3, 2, 3)), {}, ValueError, "3 blocks, which do not divide the 8"),
        (fp8_pages(scale=ones(3, 1, 2)), {}, ValueError, "pages.scale .* page_size = 1"),
        (fp8_pages(rope=ones(3, 2, R + 1)), {}, ValueError, "C.R = 12, but a row of pages has 13"),
        (fp8_pages(), {"value_width": C + 1}, ValueError, "value_width=9 .* at most 8"),
    ],
)
def test_bad_fp8_pages(pages, options, error, message):
    with pytest.raises(error, match=message):
        call("sparse_attention_decode", pages=pages, **options)


def test_scales_come_in_whole_blocks():
    with pytest.raises(ValueError, match="block=128 does not divide latent_width=192"):
        Fp8Pages.zeros(1, 1, latent_width=192, rope_width=64)


def test_traced_topk_says_static():
    arguments = good()["select_topk"]

    @jax.jit
    def run(topk):
        return ops.select_topk(arguments["scores"], arguments["ranges"], topk=topk)

    with pytest.raises(TypeError, match="static_argnames"):
        run(2)
