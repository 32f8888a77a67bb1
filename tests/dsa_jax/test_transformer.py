"""The model against itself: modes, packing, scanning, who learns from what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import filled, jit, tokens_of

from dsa_jax import presets
from dsa_jax.mla import Mode
from dsa_jax.transformer import REMAT_POLICIES, Transformer
from pallas_kernels import KeyRange, Selection

# One kind of layer, so one body to compile; other tests mix kinds.
TINY = presets.get("tiny").replace(num_hidden_layers=2, first_k_dense_replace=0)
LENGTH = 40  # five times index_topk


@functools.cache
def tiny_model():
    return filled(TINY)


def run(model, tokens, *args, **options):
    return jit(lambda model, tokens: model(tokens, *args, **options))(model, tokens)


def lm_loss(out, tokens):
    logp = jax.nn.log_softmax(out.logits[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], -1).mean()


def loss_and_grad(model, tokens, **options):
    """LM loss and its gradient; `KL` instead where an indexer loss is asked for."""

    def loss(model):
        out = model(tokens, **options)
        return out.kl.sum() if out.kl is not None else lm_loss(out, tokens)

    return jit(jax.value_and_grad(loss))(model)


def by_name(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def is_indexer(name):
    return ".indexer." in name


def assert_close(tree, other, atol):
    tree, other = by_name(tree), by_name(other)
    assert tree.keys() == other.keys()
    for name, x in tree.items():
        np.testing.assert_allclose(x, other[name], atol=atol, err_msg=name)


# fp32 through two layers, logits up to 5 and gradients up to 1: the order of sums differs between
# modes. 1e-5 is the contract's; the most seen was 5e-6.
ATOL = 1e-5


@functools.cache
def lm_loss_and_grad(attention, topk=TINY.index_topk):
    model = filled(TINY.replace(index_topk=topk))
    loss, gradient = loss_and_grad(model, tokens_of(TINY, 2, LENGTH), attention=attention)
    return float(loss), gradient


@pytest.mark.parametrize("attention", ["sparse", "masked"])
def test_dense_when_everything_is_selected(attention):
    loss, gradient = lm_loss_and_grad(attention, topk=LENGTH)
    dense_loss, dense_gradient = lm_loss_and_grad("dense")
    assert loss == pytest.approx(dense_loss, abs=ATOL)
    assert_close(gradient, dense_gradient, ATOL)


def test_sparse_equals_masked_and_not_dense():
    sparse, sparse_gradient = lm_loss_and_grad("sparse")
    masked, masked_gradient = lm_loss_and_grad("masked")
    assert sparse == pytest.approx(masked, abs=ATOL)
    assert_close(sparse_gradient, masked_gradient, ATOL)
    assert abs(sparse - lm_loss_and_grad("dense")[0]) > 1e-2


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_packed_documents_are_as_if_alone(attention):
    """One row of three documents, against three rows of one; both with padding."""
    lengths = (21, 13, 4)
    docs = [np.asarray(tokens_of(TINY, 1, n, seed=n))[0] for n in lengths]
    padding = LENGTH - sum(lengths)
    packed = np.concatenate([*docs, np.zeros(padding, int)])[None]
    packed_ids = np.repeat([1, 2, 3, 0], [*lengths, padding])[None]
    alone = np.stack([np.pad(doc, (0, LENGTH - doc.size)) for doc in docs])
    alone_ids = (np.arange(LENGTH) < np.array(lengths)[:, None]).astype(int)
    options = {"attention": attention, "indexer_loss": attention}
    packed = run(tiny_model(), jnp.asarray(packed), None, jnp.asarray(packed_ids), **options)
    alone = run(tiny_model(), jnp.asarray(alone), None, jnp.asarray(alone_ids), **options)
    expected = np.asarray(alone.logits)[alone_ids == 1]
    np.testing.assert_allclose(packed.logits[0, : sum(lengths)], expected, atol=ATOL)
    # A mean over rows that see a key: documents count by their length, padding not at all.
    np.testing.assert_allclose(packed.kl, alone.kl, rtol=1e-5)
    np.testing.assert_array_equal(packed.router_load, alone.router_load)
    assert packed.router_load.sum() == 2 * sum(lengths) * TINY.num_experts_per_tok


def test_positions_restart_in_every_document():
    """Invisible in logits, where only distances count, but not to a limit on positions."""
    ids = jnp.array([[5, 5, 5, 7, 7, 0, 0]])
    rows = tiny_model().rows(jnp.zeros_like(ids), None, ids, None)
    angle = jnp.arctan2(rows.turn.sin, rows.turn.cos)[0, :, 0]  # pair 0 turns a radian a token
    np.testing.assert_allclose(angle, [0, 1, 2, 0, 1, 0, 1], atol=1e-6)


def test_only_distances_count():
    """A shifted document has the same logits; a stretched one has not."""
    model, tokens = tiny_model(), tokens_of(TINY, 1, LENGTH)
    forward = jit(lambda positions: model(tokens, positions).logits)
    here = forward(jnp.arange(LENGTH)[None])
    # Angles around 100 radians carry 100 times the rounding of fp32.
    np.testing.assert_allclose(forward(jnp.arange(100, 100 + LENGTH)[None]), here, atol=1e-3)
    assert np.abs(forward(2 * jnp.arange(LENGTH)[None]) - here).max() > 0.1


@pytest.mark.parametrize("name", ["tiny", "tiny-shared"])
def test_scan_equals_unrolled(name):
    config = presets.get(name)
    tokens = tokens_of(config, 2, LENGTH)
    scanned, unrolled = filled(config), filled(config, scan=False)
    options = {"attention": "sparse", "indexer_loss": "sparse", "return_selection": True}
    a, b = run(scanned, tokens, **options), run(unrolled, tokens, **options)
    np.testing.assert_array_equal(a.selection.indices, b.selection.indices)
    assert_close(a, b, ATOL)


def test_shared_layers_reuse_the_full_layer_before():
    config = presets.get("tiny-shared")
    model, tokens = filled(config), tokens_of(config, 1, LENGTH)
    out = run(model, tokens, indexer_loss="sparse", return_selection=True)
    indices = np.asarray(out.selection.indices)
    assert config.indexer_layers == (0, 1, 4, 7)
    for layer in range(config.num_hidden_layers):
        full = max(i for i in config.indexer_layers if i <= layer)
        np.testing.assert_array_equal(indices[layer], indices[full])
    assert all((indices[a] != indices[b]).any() for a, b in [(0, 1), (1, 4), (4, 7)])
    is_full = np.isin(np.arange(config.num_hidden_layers), config.indexer_layers)
    np.testing.assert_array_equal(np.asarray(out.kl) > 0, is_full)


def test_dense_and_sparse_share_no_gradient_with_the_indexer():
    """LM loss -> everything but the indexer; KL -> the indexer only; the rest exactly zero."""
    model, tokens = tiny_model(), tokens_of(TINY, 2, LENGTH)
    for attention in ("dense", "sparse"):
        _, gradient = lm_loss_and_grad(attention)
        for name, g in by_name(gradient).items():
            learns = not is_indexer(name) and "e_score_correction_bias" not in name
            assert g.any() == learns, name
        _, gradient = loss_and_grad(model, tokens, attention=attention, indexer_loss=attention)
        for name, g in by_name(gradient).items():
            assert g.any() == is_indexer(name), name


def test_gradients_with_every_rounding_on():
    """FP8 selection and latent: finite, straight-through, and still apart."""
    config = presets.get("tiny-fp8").replace(num_hidden_layers=1, first_k_dense_replace=0)
    model, tokens = filled(config), tokens_of(config, 2, LENGTH)

    @jit
    def gradients(model):
        def loss(model, of):
            out = model(tokens, attention="sparse", indexer_loss="sparse")
            return out.kl.sum() if of == "kl" else lm_loss(out, tokens)

        return jax.grad(loss)(model, "kl"), jax.grad(loss)(model, "lm")

    kl, lm = map(by_name, gradients(model))
    for name in kl:
        assert np.isfinite(kl[name]).all()
        assert np.isfinite(lm[name]).all()
        assert kl[name].any() == is_indexer(name), name
        assert lm[name].any() == (not is_indexer(name) and "correction" not in name), name


def test_warmup_forward_is_the_dense_forward():
    """Bit for bit: asking for the indexer's loss changes nothing the model computes."""
    model, tokens = tiny_model(), tokens_of(TINY, 2, LENGTH)
    dense = run(model, tokens, attention="dense")
    warmup = run(model, tokens, attention="dense", indexer_loss="dense")
    np.testing.assert_array_equal(dense.logits, warmup.logits)
    np.testing.assert_array_equal(dense.hidden, warmup.hidden)


@functools.cache
def both_losses_gradient(remat):
    tokens = tokens_of(TINY, 2, LENGTH)

    def loss(model):
        out = model(tokens, attention="sparse", indexer_loss="sparse")
        return lm_loss(out, tokens) + out.kl.sum()

    return jit(jax.grad(loss))(filled(TINY, remat=remat))


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_no_gradient(remat):
    assert_close(both_losses_gradient(remat), both_losses_gradient("none"), ATOL)


def test_a_dense_model_runs_sparse_with_a_selector():
    model = filled(TINY.without_indexer())
    tokens = tokens_of(TINY, 2, LENGTH)

    def recent(state):
        assert state.index_q is None
        offsets = jnp.arange(8)
        indices = state.ranges.end[..., None] - 8 + offsets
        indices = jnp.where(indices >= state.ranges.start[..., None], indices, -1)
        order = jnp.argsort(indices < 0, axis=-1, stable=True)
        return Selection(jnp.take_along_axis(indices, order, -1).astype(jnp.int32))

    def everything(state):
        keys = jnp.arange(LENGTH, dtype=jnp.int32)
        visible = keys < state.ranges.end[..., None]
        return Selection(jnp.where(visible, keys, -1))

    out = run(model, tokens, selector=recent, return_selection=True)
    assert list(out.selection.indices[1, 1, 20]) == list(range(13, 21))
    dense = run(model, tokens, attention="dense")
    full = run(model, tokens, selector=everything)
    np.testing.assert_allclose(full.logits, dense.logits, atol=ATOL)
    assert np.abs(out.logits - dense.logits).max() > 0.1


def test_probe_sees_the_attention_of_every_layer():
    """Scores from the state's own fields give back the selection and the indexer's choice."""
    tokens = tokens_of(TINY, 2, LENGTH)

    def probe(state):
        dots = jax.nn.relu(jnp.einsum("BTIH,BSH->BTIS", state.index_q, state.index_k))
        scores = jnp.einsum("BTIS,BTI->BTS", dots, state.index_w)
        scores = jnp.where(state.ranges.mask(LENGTH), scores, -jnp.inf)
        best = jax.lax.top_k(scores, 8)[1]
        attention = state.scale * jnp.einsum("BTNC,BSC->BTNS", state.q, state.kv)
        return state.layer, jnp.sort(best, -1), attention

    out = run(tiny_model(), tokens, attention="dense", probe=probe, return_selection=True)
    layer, best, attention = out.probe
    assert list(layer) == [0, 1]
    late = slice(8, None)  # rows with at least topk visible keys
    np.testing.assert_array_equal(best[:, :, late], out.selection.indices[:, :, late])
    assert attention.shape == (2, 2, LENGTH, 4, LENGTH)


def test_tied_embeddings():
    config = TINY.replace(tie_word_embeddings=True)
    model, tokens = filled(config), tokens_of(config, 1, 12)
    assert model.lm_head is None
    out = run(model, tokens)
    expected = out.hidden @ model.embed_tokens.weight[...].T
    np.testing.assert_allclose(out.logits, expected, atol=ATOL)


def test_bf16_compute_is_near_fp32():
    tokens = tokens_of(TINY, 2, LENGTH)
    low = run(filled(TINY, dtype=jnp.bfloat16), tokens, attention="dense")
    high = run(tiny_model(), tokens, attention="dense")
    assert low.hidden.dtype == jnp.bfloat16
    assert low.logits.dtype == jnp.float32
    # bf16 keeps 8 bits: 2^-8 of activations around 1 through two layers; logits reach 5.
    assert np.abs(low.logits - high.logits).mean() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash"}, "attention='flash'"),
        ({"indexer_loss": "kl"}, "indexer_loss='kl'"),
        ({"indexer_loss": "dense"}, "does not go with attention='sparse'"),
        ({"indexer_loss": "sparse", "attention": "dense"}, "does not go with"),
        ({"positions": jnp.zeros((1, 3), jnp.int32)}, "positions has shape"),
        ({"segment_ids": jnp.zeros((2, 4), jnp.int32)}, "segment_ids has shape"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(jnp.zeros((1, 4), jnp.int32), **options)


def test_a_dense_config_cannot_choose_keys():
    model = filled(TINY.without_indexer())
    tokens = jnp.zeros((1, 4), jnp.int32)
    for options in ({}, {"attention": "masked"}, {"attention": "dense", "return_selection": True}):
        with pytest.raises(ValueError, match="no indexer"):
            model(tokens, **options)
    with pytest.raises(ValueError, match="no indexer"):
        model(tokens, attention="dense", indexer_loss="dense")


def test_tokens_must_be_integers():
    with pytest.raises(ValueError, match=r"float32\[1, 4\]"):
        tiny_model()(jnp.zeros((1, 4)))


def test_unknown_remat():
    with pytest.raises(ValueError, match="remat='some'"):
        Transformer(TINY, rngs=nnx.Rngs(0), remat="some")


def test_ranges_and_modes_are_plain_values():
    """What layers are told can be hashed and compared: it never holds arrays of a trace."""
    assert hash(Mode("dense")) == hash(Mode("dense"))
    assert isinstance(KeyRange.causal(1, 2), tuple)
