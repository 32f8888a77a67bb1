"""Hugging Face checkpoints: there and back."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import filled

import dsa_jax
from convert import hf_to_orbax, orbax_to_hf
from dsa_jax import presets
from dsa_jax.layer_tree import flatten


@pytest.mark.parametrize("name", ["tiny", "tiny-shared"])
def test_there_and_back(name, tmp_path):
    model = filled(presets.get(name))
    dsa_jax.save(model, tmp_path / "ours")
    orbax_to_hf(tmp_path / "ours", tmp_path / "hf")
    hf_to_orbax(tmp_path / "hf", tmp_path / "again")
    again = flatten(dsa_jax.load(tmp_path / "again", dtype=jnp.float32))
    for path, leaf in flatten(model).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(again[path]), err_msg=str(path))
