"""The table of names against the published inventory, in all directions, without a weight."""

import math
from pathlib import Path

import pytest

from convert.rules import entries, hf_scale
from convert.source import Tensor, plan
from convert.weights import BF16, E4M3, F32
from dsa_jax import param_count, presets
from dsa_jax.checkpoint import abstract_model
from dsa_jax.layer_tree import flatten

D = 7168


def published_index():
    """DeepSeek-V3.2-Exp's index, written down from its inventory: no table of ours is used."""
    index = {
        "model.embed_tokens.weight": Tensor(BF16, (129280, D)),
        "lm_head.weight": Tensor(BF16, (129280, D)),
        "model.norm.weight": Tensor(BF16, (D,)),
    }

    def fp8(name, rows, columns):
        index[f"{name}.weight"] = Tensor(E4M3, (rows, columns))
        scale = (-(-rows // 128), -(-columns // 128))
        index[f"{name}.weight_scale_inv"] = Tensor(F32, scale)

    def mlp(name, width):
        fp8(f"{name}.gate_proj", width, D)
        fp8(f"{name}.up_proj", width, D)
        fp8(f"{name}.down_proj", D, width)

    for layer in range(62):
        here = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            index[f"{here}.{norm}.weight"] = Tensor(BF16, (D,))
        attention = f"{here}.self_attn"
        fp8(f"{attention}.q_a_proj", 1536, D)
        index[f"{attention}.q_a_layernorm.weight"] = Tensor(BF16, (1536,))
        fp8(f"{attention}.q_b_proj", 24576, 1536)
        fp8(f"{attention}.kv_a_proj_with_mqa", 576, D)
        index[f"{attention}.kv_a_layernorm.weight"] = Tensor(BF16, (512,))
        fp8(f"{attention}.kv_b_proj", 32768, 512)
        fp8(f"{attention}.o_proj", D, 16384)
        fp8(f"{attention}.indexer.wq_b", 8192, 1536)
        fp8(f"{attention}.indexer.wk", 128, D)
        index[f"{attention}.indexer.k_norm.weight"] = Tensor(F32, (128,))
        index[f"{attention}.indexer.k_norm.bias"] = Tensor(F32, (128,))
        index[f"{attention}.indexer.weights_proj.weight"] = Tensor(BF16, (64, D))
        if layer < 3:
            mlp(f"{here}.mlp", 18432)
            continue
        index[f"{here}.mlp.gate.weight"] = Tensor(BF16, (256, D))
        index[f"{here}.mlp.gate.e_score_correction_bias"] = Tensor(F32, (256,))
        mlp(f"{here}.mlp.shared_experts", 2048)
        for expert in range(256):
            mlp(f"{here}.mlp.experts.{expert}", 2048)
    extra = "model.layers.61"
    index[f"{extra}.embed_tokens.weight"] = Tensor(BF16, (129280, D))
    index[f"{extra}.shared_head.head.weight"] = Tensor(BF16, (129280, D))
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        index[f"{extra}.{norm}.weight"] = Tensor(BF16, (D,))
    index[f"{extra}.eh_proj.weight"] = Tensor(BF16, (D, 2 * D))
    return index


class Index:
    """A source of names only."""

    def __init__(self, config, tensors):
        self.config, self.tensors = config, tensors
        self.companions: list[Path] = []

    def where(self, name):
        return name

    def read(self, name, rows):
        raise AssertionError("nothing is read to plan")


@pytest.fixture(scope="module")
def index():
    return published_index()


def test_the_published_inventory(index):
    assert len(index) == 92_425
    sizes = {name: math.prod(tensor.shape) for name, tensor in index.items()}
    scales = sum(n for name, n in sizes.items() if name.endswith("_scale_inv"))
    assert sum(sizes.values()) == 685_396_921_376
    assert sum(sizes.values()) - scales == 685_355_329_792
    assert sum(tensor.nbytes for tensor in index.values()) == 689_469_018_240


def test_from_hugging_face_to_ours(index):
    config = presets.get("deepseek-v3.2-exp")
    todo = plan(Index(config, index))
    assert todo.config == config
    assert todo.nbytes == 689_469_018_240
    ours = {leaf.entry.path: math.prod(leaf.entry.shape) for leaf in todo.leaves}
    count = param_count(config)
    assert sum(n for path, n in ours.items() if path[0] == "mtp") == count.mtp
    assert sum(ours.values()) == count.main + count.mtp == 685_355_329_792
    scales = [leaf.entry.scale_shape(todo.fp8) for leaf in todo.leaves if leaf.scales_out]
    assert sum(map(math.prod, scales)) == count.scales == 41_591_584


def test_from_ours_to_hugging_face(index):
    """All bits back: the same names, shapes and dtypes."""
    todo = plan(Index(presets.get("deepseek-v3.2-exp"), index))
    back = {}
    for leaf in todo.leaves:
        back |= todo.tensors(leaf)
    assert back == index


def test_the_extra_layer_can_be_left_out(index):
    todo = plan(Index(presets.get("deepseek-v3.2-exp"), index), mtp=False)
    names = [name for leaf in todo.leaves for name in todo.tensors(leaf)]
    assert len(names) == 90_854
    assert todo.config.num_nextn_predict_layers == 0


def test_v31_terminus_is_v32_without_indexers(index):
    dense = {name: tensor for name, tensor in index.items() if ".indexer." not in name}
    assert len(dense) == 91_991
    plan(Index(presets.get("deepseek-v3.1-terminus"), dense))


@pytest.mark.parametrize("name", presets.names())
def test_every_leaf_has_one_place_in_every_layout(name):
    config = presets.get(name)
    found = entries(config)
    for names in ([n for e in found for n in e.names], [n for e in found for n in e.demo]):
        assert len(set(names)) == len(names)
    main = [e for e in found if e.path[0] != "mtp"]
    assert all(len(e.demo) == len(e.names) for e in main)
    assert not any(e.demo for e in found if e.path[0] == "mtp")
    leaves = sum(leaf.shape[0] if "stacks" in path else 1
                 for path, leaf in flatten(abstract_model(config)).items())  # fmt: skip
    assert len(main) == leaves


def test_layers_that_share_a_selection_have_no_indexer():
    names = [n for e in entries(presets.get("glm-5.2")) for n in e.names if ".indexer.wk." in n]
    layers = sorted(int(name.split(".")[2]) for name in names)
    assert layers == [0, 1, *range(2, 78, 4), 78]  # 21 of 78, and the extra layer's own


def test_names_of_the_demo():
    found = {e.path: e for e in entries(presets.get("deepseek-v3.2-exp"))}
    wanted = {
        "embed_tokens/weight": ("embed.weight", 0),
        "lm_head/weight": ("head.weight", 0),
        "layers/0/mlp/down_proj/weight": ("layers.0.ffn.w2.weight", 1),
        "layers/3/self_attn/q_b_proj/weight": ("layers.3.attn.wq_b.weight", 0),
        "layers/3/self_attn/indexer/wq_b/weight": ("layers.3.attn.indexer.wq_b.weight", None),
        "layers/3/self_attn/o_proj/weight": ("layers.3.attn.wo.weight", 1),
        "layers/60/mlp/gate/e_score_correction_bias": ("layers.60.ffn.gate.bias", None),
        "layers/60/mlp/shared_experts/up_proj/weight": (
            "layers.60.ffn.shared_experts.w3.weight", 0,
        ),
        "layers/60/mlp/experts/gate_proj": ("layers.60.ffn.experts.0.w1.weight", None),
    }  # fmt: skip
    for path, (name, split) in wanted.items():
        entry = found[tuple(path.split("/"))]
        assert (entry.demo[0], entry.split) == (name, split)


def test_scale_names():
    assert hf_scale("a.weight") == "a.weight_scale_inv"
