"""The same numbers as transformers in fp32: what we compute is what the checkpoint means."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsa_jax
from convert import hf_to_orbax
from convert.compare import (
    cases,
    difference,
    layers,
    load_transformers,
    observe,
    observe_transformers,
    torch_modules,
    with_config,
)
from convert.rules import entries
from dsa_jax.cache import init_cache
from dsa_jax.layer_tree import flatten, split_layers
from dsa_jax.mla import Mode
from pallas_kernels import KeyRange, Selection, indexer_scores
from tests.oracle.named_weights import LENGTH, configs, tokens_of
from tests.parity import random_models
from tests.parity.random_models import build

NAMES = ("deepseek_v32", "deepseek_v3", "glm-5", "glm-5.2")
# fp32 through three to nine layers, sums in other orders; greatest difference over greatest value.
# The most seen was 8e-7 for one module and 4e-6 for a model.
MODULE, MODEL = 1e-5, 1e-4

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Pair(NamedTuple):
    """A checkpoint in both hands."""

    theirs: Any
    ours: dsa_jax.Transformer

    @property
    def attention(self) -> Any:
        return "sparse" if self.ours.config.has_indexer else "dense"


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    random_models.save(request.param, folder / "hf")
    hf_to_orbax(folder / "hf", folder / "ours")
    model = dsa_jax.load(folder / "ours", dtype=jnp.float32)
    assert model.config.numerics == dsa_jax.Numerics()  # nothing in FP8 in the checkpoint
    as_theirs = cases(model.config)[0].config
    return Pair(load_transformers(folder / "hf", "fp32"), with_config(model, as_theirs))


@functools.partial(jit, static_argnames=("attention",))
def run(model, tokens, segment_ids=None, cache=None, *, attention):
    chosen = attention != "dense"
    return model(
        tokens, None, segment_ids, cache, attention=attention, return_selection=chosen
    )  # fmt: skip


def near(ours, theirs, bound):
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


def test_logits_hidden_states_and_selected_keys(pair):
    tokens = tokens_of(pair.ours.config, 2)
    theirs = observe_transformers(pair.theirs, tokens)
    ours = observe(pair.ours, tokens)
    for layer, (a, b) in enumerate(zip(ours.hidden, theirs.hidden, strict=True)):
        assert np.abs(a - b).max() < MODEL * np.abs(b).max(), layer
    near(ours.logits, theirs.logits, MODEL)
    if pair.attention == "dense":
        assert ours.selected is theirs.selected is None
    else:
        np.testing.assert_array_equal(ours.selected, theirs.selected)
        assert (theirs.selected[:, :, -1].sum(-1) == 8).all()  # topk of 72 keys
    assert difference(ours, theirs).kl < 1e-9
    # The whole model at once, scanned, over absorbed keys.
    out = run(pair.ours, jnp.asarray(tokens), attention=pair.attention)
    near(out.logits, theirs.logits, MODEL)
    if out.selection is not None:
        mask = Selection(out.selection.indices.reshape(-1, LENGTH, 8))
        chosen = np.asarray(mask.mask(LENGTH)).reshape(theirs.selected.shape)
        np.testing.assert_array_equal(chosen, theirs.selected)


def test_modules(pair):
    """Each attention and MLP given transformers' own input."""
    torch, _ = torch_modules()
    tokens = tokens_of(pair.ours.config, 1)
    seen: list[dict[str, np.ndarray]] = [{} for _ in pair.theirs.model.layers]

    def keep(place, name):
        def hook(_module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            output = output[0] if isinstance(output, tuple) else output
            place[name] = (given.numpy(), output.numpy())

        return hook

    hooks = [
        getattr(layer, name).register_forward_hook(keep(place, name), with_kwargs=True)
        for place, layer in zip(seen, pair.theirs.model.layers, strict=True)
        for name in ("input_layernorm", "self_attn", "mlp")
    ]
    with torch.no_grad():
        pair.theirs(torch.as_tensor(tokens))
    for hook in hooks:
        hook.remove()

    rows = pair.ours.rows(jnp.asarray(tokens))
    attention = "masked" if pair.ours.config.has_indexer else "dense"
    mode = Mode(attention, select=attention == "masked")
    attend = jit(lambda mla, x, layer, shared: mla(x, rows, mode, layer, None, shared))
    norm = jit(lambda norm, x: norm(x))
    shared = None
    for (layer, block), place in zip(layers(pair.ours), seen, strict=True):
        given, expected = place["input_layernorm"]
        near(norm(block.input_layernorm, given), expected, MODULE)
        given, expected = place["self_attn"]
        out = attend(block.self_attn, given, jnp.int32(layer), shared)
        shared = out.selection
        near(out.out, expected, MODULE)
        given, expected = place["mlp"]
        if pair.ours.config.is_moe(layer):
            near(jit(lambda moe, x: moe(x, rows.valid)[0])(block.mlp, given), expected, MODULE)
        else:
            near(norm(block.mlp, given), expected, MODULE)


def test_prefill_in_chunks_then_decode(pair):
    """Through both caches: two chunks of 32, then one token at a time."""
    torch, _ = torch_modules()
    tokens = tokens_of(pair.ours.config, 2)
    whole = observe_transformers(pair.theirs, tokens)
    cache = init_cache(pair.ours.config, 2, LENGTH, jnp.float32)
    past, at = None, 0
    for size in (32, 32, *[1] * 8):
        part = tokens[:, at : at + size]
        with torch.no_grad():
            theirs = pair.theirs(torch.as_tensor(part), past_key_values=past, use_cache=True)
        past = theirs.past_key_values
        ours = run(pair.ours, jnp.asarray(part), None, cache, attention=pair.attention)
        cache = ours.cache
        near(ours.logits, theirs.logits.numpy(), MODEL)
        near(ours.logits, whole.logits[:, at : at + size], MODEL)
        if ours.selection is not None:
            assert whole.selected is not None
            for layer, indices in enumerate(np.asarray(ours.selection.indices)):
                mask = np.asarray(Selection(indices).mask(LENGTH))
                np.testing.assert_array_equal(mask, whole.selected[layer, :, at : at + size])
        at += size


def test_padded_batch(pair):
    torch, _ = torch_modules()
    tokens = tokens_of(pair.ours.config, 2)
    valid = np.arange(LENGTH) < np.array([[LENGTH], [50]])
    theirs = observe_transformers(
        pair.theirs, tokens, attention_mask=torch.as_tensor(valid.astype(np.int64))
    )
    ours = observe(pair.ours, tokens, segment_ids=valid.astype(np.int32))
    found = difference(ours, theirs, valid)
    assert max(found.logits, found.hidden) < MODEL
    if ours.selected is not None:
        assert theirs.selected is not None
        np.testing.assert_array_equal(ours.selected[:, valid], theirs.selected[:, valid])
    out = run(
        pair.ours, jnp.asarray(tokens), jnp.asarray(valid, jnp.int32), attention=pair.attention
    )
    near(np.asarray(out.logits)[valid], theirs.logits[valid], MODEL)


def test_packed_batch(pair):
    """Three documents in a row; transformers tells them apart by their positions."""
    torch, _ = torch_modules()
    tokens = tokens_of(pair.ours.config, 1)
    lengths = (30, 9, 33)
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    ids = np.repeat([1, 2, 3], lengths)[None]
    theirs = observe_transformers(
        pair.theirs, tokens, position_ids=torch.as_tensor(positions), use_cache=False
    )
    ours = observe(pair.ours, tokens, segment_ids=ids)
    found = difference(ours, theirs)
    assert max(found.logits, found.hidden) < MODEL
    if ours.selected is not None:
        np.testing.assert_array_equal(ours.selected, theirs.selected)
        assert not ours.selected[:, :, 30:, :30].any()
    out = run(pair.ours, jnp.asarray(tokens), jnp.asarray(ids), attention=pair.attention)
    near(out.logits, theirs.logits, MODEL)


def their_gradients(model) -> dict[str, np.ndarray]:
    """By the names of the checkpoint; the experts' fused tensors taken apart."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradient = np.zeros(parameter.shape) if gradient is None else gradient.numpy()
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, both in enumerate(gradient):
                gate, up = np.split(both, 2)
                found[f"{prefix}.{e}.gate_proj.weight"] = gate
                found[f"{prefix}.{e}.up_proj.weight"] = up
        elif prefix.endswith("experts"):
            found |= {f"{prefix}.{e}.{last}.weight": one for e, one in enumerate(gradient)}
        else:
            found[name] = gradient
    return found


def test_gradients_of_the_lm_loss(pair):
    torch, _ = torch_modules()
    config = pair.ours.config
    tokens = tokens_of(config, 1)
    theirs = torch.as_tensor(tokens)
    pair.theirs.zero_grad()
    loss = pair.theirs(theirs, labels=theirs).loss
    loss.backward()
    expected = their_gradients(pair.theirs)

    def ours(model):
        logits = model(jnp.asarray(tokens), attention=pair.attention).logits
        logp = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(logp, jnp.asarray(tokens)[:, 1:, None], -1).mean()

    value, gradient = jit(jax.value_and_grad(ours))(pair.ours)
    # fp32; a mean over tokens, so closer than single logits.
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    flat = flatten(split_layers(gradient, config))
    for entry in entries(config):
        if entry.path[-1] == "e_score_correction_bias":
            continue  # a buffer there
        leaf = np.asarray(flat[entry.path])
        for e, name in enumerate(entry.names):
            part = leaf[e] if entry.stacked else leaf
            part = part.T if entry.transposed else part
            if ".indexer." in name:
                assert not part.any(), name  # it learns from its own loss only
                assert not expected[name].any(), name
            else:
                largest = np.abs(expected[name]).max()
                # Gradients sum over all tokens; 1e-4 of the largest, as for the model.
                assert np.abs(part - expected[name]).max() <= MODEL * largest, name


def test_only_ties_are_decided_otherwise(tmp_path):
    """Two heads reject many keys alike: where selections differ, the keys score exactly 0."""
    config = configs()["deepseek_v32"].replace(index_n_heads=2, num_hidden_layers=1)
    build(config).save_pretrained(tmp_path / "hf")
    hf_to_orbax(tmp_path / "hf", tmp_path / "ours")
    tokens = tokens_of(config, 2)
    theirs = observe_transformers(load_transformers(tmp_path / "hf", "fp32"), tokens).selected
    model = dsa_jax.load(tmp_path / "ours", dtype=jnp.float32)
    ours = observe(model, tokens).selected
    state = model(jnp.asarray(tokens), probe=lambda state: state).probe
    q, k, w = (x[0] for x in (state.index_q, state.index_k, state.index_w))
    scores = np.asarray(indexer_scores(q, k, w, KeyRange.causal(2, LENGTH)))
    assert ours is not None
    assert theirs is not None
    differ = ours[0] != theirs[0]
    assert differ.any()
    assert (scores[differ] == 0).all()
    for row, t, _ in np.argwhere(differ):  # of equal ones the lower index, here
        tied = np.flatnonzero((scores[row, t] == 0) & ours[0, row, t])
        left = np.flatnonzero((scores[row, t] == 0) & ~ours[0, row, t])
        assert tied.max() < left.min()
