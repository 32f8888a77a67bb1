"""Indexers for a dense checkpoint: all else bit by bit, and nothing else missing or left over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import assert_same_bits, fp8_config, random_tensors, read_hf, write_hf

import dsa_jax
from convert import ConvertError, add_indexer, orbax_to_hf
from convert.weights import E4M3, F32

SPARSE = fp8_config()
DENSE = SPARSE.without_indexer()
SIZES = {"index_n_heads": 6, "index_head_dim": 128, "index_topk": 8}


@pytest.fixture(scope="module")
def dense():
    return random_tensors(DENSE)


@pytest.fixture(scope="module")
def source(dense, tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("dense") / "hf", DENSE, dense)


def test_every_layer_gets_one_and_the_rest_keeps_its_bits(source, dense, tmp_path):
    config = add_indexer(source, tmp_path / "ours", **SIZES)
    assert (config.model_type, config.index_topk, config.numerics) == (
        "deepseek_v32", 8, SPARSE.numerics,
    )  # fmt: skip
    orbax_to_hf(tmp_path / "ours", tmp_path / "hf")
    found = read_hf(tmp_path / "hf")
    new = {name: found.pop(name) for name in list(found) if ".indexer." in name}
    assert_same_bits(found, dense)
    assert len(new) == 7 * (DENSE.num_hidden_layers + 1)  # the extra layer too
    first, other = (f"model.layers.{i}.self_attn.indexer." for i in (0, 3))
    assert new[f"{first}wq_b.weight"].dtype == E4M3
    assert new[f"{first}k_norm.weight"].dtype == F32
    np.testing.assert_array_equal(new[f"{first}k_norm.weight"], 1)
    np.testing.assert_array_equal(new[f"{first}k_norm.bias"], 0)
    w = new[f"{first}weights_proj.weight"].astype(np.float32)
    assert np.abs(w).min() >= 0 < np.std(w)
    assert not np.array_equal(new[f"{first}wk.weight"], new[f"{other}wk.weight"])
    # What is made is what the model makes: the same sizes of numbers.
    wk = new[f"{first}wk.weight"].astype(np.float32) * new[f"{first}wk.weight_scale_inv"]
    assert np.std(wk) == pytest.approx(0.5 * DENSE.hidden_size**-0.5, rel=0.1)


def test_it_runs_and_its_seed_decides(source, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        add_indexer(source, tmp_path / name, **SIZES, seed=seed, dtype="fp32", mtp=False)
    a, b, c = (dsa_jax.load(tmp_path / name, dtype=jnp.float32) for name in "abc")
    leaves = [jax.tree.leaves(m.stacks[0].blocks[0].self_attn.indexer) for m in (a, b, c)]
    for x, y in zip(leaves[0], leaves[1], strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert not np.array_equal(leaves[0][-1], leaves[2][-1])


def test_a_checkpoint_that_has_them_is_refused(tmp_path):
    write_hf(tmp_path / "hf", SPARSE, random_tensors(SPARSE))
    with pytest.raises(ConvertError, match="deepseek_v32 with index_topk=8; an indexer can be"):
        add_indexer(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.gate.weight", "missing tensor"),
        ("model.layers.0.self_attn.o_proj.weight", "missing tensor .*, whose dtype"),
        ("model.new.weight", "is not one"),
    ],
)
def test_any_other_difference_is_an_error(name, message, dense, tmp_path):
    content = dict(dense)
    if content.pop(name, None) is None:
        content[name] = np.ones(3, np.float32)
    write_hf(tmp_path / "hf", DENSE, content)
    with pytest.raises(ConvertError, match=message) as caught:
        add_indexer(tmp_path / "hf", tmp_path / "ours", **SIZES)
    assert name in str(caught.value)
    assert not (tmp_path / "ours").exists()
