"""The controls: what each picks, on packed rows with fewer keys than k among them."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KeyRange, lightning_indexer
from train.controls import SCORED, control_keys

T, K = 12, 3


@pytest.fixture(scope="module")
def state():
    keys = iter(jax.random.split(jax.random.key(0), 5))
    segments = jnp.array([[1] * 5 + [2] * 6 + [0], [1] * 12])
    return types.SimpleNamespace(
        layer=jnp.int32(1),
        q=jax.random.normal(next(keys), (2, T, 2, 6)),
        kv=jax.random.normal(next(keys), (2, T, 6)),
        scale=0.5,
        index_q=jax.random.normal(next(keys), (2, T, 2, 4)),
        index_k=jax.random.normal(next(keys), (2, T, 4)),
        index_w=jax.random.normal(next(keys), (2, T, 2)),
        index_k_scale=None,
        ranges=KeyRange.packed(segments),
        selection=None,
    )


@functools.partial(jax.jit, static_argnames=("topk", "tile_bytes"))
def run(fields, which, topk, seed, tile_bytes):
    state = types.SimpleNamespace(scale=0.5, **fields)
    return control_keys(state, which, topk=topk, seed=seed, tile_bytes=tile_bytes)


def choose(state, control, topk=K, seed=0, tile_bytes=2**20):
    """All controls of one k share one compiled program."""
    fields = {name: value for name, value in vars(state).items() if name != "scale"}
    which = jnp.int32(SCORED.index(control))
    return run(fields, which, topk=topk, seed=seed, tile_bytes=tile_bytes)


@pytest.mark.parametrize("control", SCORED)
def test_every_control_makes_a_proper_selection(state, control):
    """Ascending, inside the range, -1 at the end only, min(k, visible) keys."""
    indices = np.asarray(choose(state, control).indices)
    start, end = (np.asarray(x) for x in state.ranges)
    for b, t in np.ndindex(2, T):
        row = indices[b, t]
        chosen = row[row >= 0]
        assert np.all(row[len(chosen) :] == -1)
        assert np.all(np.diff(chosen) > 0)
        assert len(chosen) == min(K, end[b, t] - start[b, t])
        assert np.all((chosen >= start[b, t]) & (chosen < end[b, t]))


@pytest.mark.parametrize("control", SCORED)
def test_tiles_change_nothing(state, control):
    # 2 rows x 2 heads x 12 keys x 4 bytes = 192 bytes a query: tiles of 5, the last one padded.
    tiled = choose(state, control, tile_bytes=960)
    np.testing.assert_array_equal(tiled.indices, choose(state, control).indices)


def test_recent_keys_end_with_the_query_itself(state):
    indices = np.asarray(choose(state, "recent").indices)
    np.testing.assert_array_equal(indices[0, 4], [2, 3, 4])
    np.testing.assert_array_equal(indices[0, 5], [5, -1, -1])  # a document's first token
    np.testing.assert_array_equal(indices[0, 10], [8, 9, 10])
    np.testing.assert_array_equal(indices[0, 11], [-1, -1, -1])  # padding


def test_more_keys_than_there_are_is_all_of_them(state):
    chosen = choose(state, "recent", topk=1000)
    assert chosen.indices.shape[-1] == T
    np.testing.assert_array_equal(chosen.mask(T), state.ranges.mask(T))


def test_random_keys_differ_by_layer_and_seed_and_repeat(state):
    first = choose(state, "random", seed=0).indices
    np.testing.assert_array_equal(first, choose(state, "random", seed=0).indices)
    other_layer = types.SimpleNamespace(**{**vars(state), "layer": jnp.int32(2)})
    for other in (choose(state, "random", seed=1), choose(other_layer, "random", seed=0)):
        assert not np.array_equal(first, other.indices)
    # Rows of a batch and neighbouring queries are drawn apart as well.
    assert not np.array_equal(first[0, 10], first[1, 10])
    sets = [set(row) for row in np.asarray(first[1])]
    # With one draw for all queries, a query's keys would be its neighbour's and itself.
    assert any(sets[t] - sets[t - 1] - {t} for t in range(5, T))


def test_random_keys_reach_every_key(state):
    draws = [choose(state, "random", seed=seed).mask(T)[1, 10] for seed in range(30)]
    seen = np.any(draws, axis=0)
    np.testing.assert_array_equal(seen, state.ranges.mask(T)[1, 10])


def test_oracle_takes_the_most_attended_keys(state):
    # Query 10 sees keys 5..10; the teacher is the mean of two heads' softmax.
    logits = 0.5 * np.einsum("nc,sc->ns", state.q[0, 10], state.kv[0, 5:11])
    p = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean(0)
    expected = np.sort(np.argsort(-p)[:K]) + 5
    np.testing.assert_array_equal(choose(state, "oracle").indices[0, 10], expected)


def test_the_indexers_keys_are_the_ops(state):
    own = lightning_indexer(state.index_q, state.index_k, state.index_w, state.ranges, topk=2)
    np.testing.assert_array_equal(choose(state, "indexer", topk=2).indices, own.indices)


def test_a_layer_without_an_indexer_has_the_other_controls(state):
    shared = {"index_q": None, "index_k": None, "index_w": None}
    shared = types.SimpleNamespace(**{**vars(state), **shared})
    for control in ("random", "recent", "oracle"):
        np.testing.assert_array_equal(
            choose(shared, control).indices, choose(state, control).indices
        )
