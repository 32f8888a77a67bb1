"""Rows that travel to their experts and back, against all experts in one place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_models import jit

from dsa_jax import expert_parallel
from dsa_jax.expert_parallel import exchange, quota_of, routed
from dsa_jax.moe import Routing, dispatch
from dsa_jax.sharding import MeshConfig, make_mesh

M, K, D, E = 24, 2, 5, 8
AXES = ("expert", "context")
RNG = np.random.default_rng(0)


def apply(w, x, group_sizes, live):
    """A matrix per expert; rows of another device's expert, or of none, would show."""
    expert = (jnp.arange(len(x))[:, None] >= jnp.cumsum(group_sizes)).sum(1)
    out = jnp.tanh(jnp.einsum("md,mdf->mf", x, w[jnp.minimum(expert, len(w) - 1)]))
    return jnp.where(live[:, None], out, 0)


def choices(kind: str) -> np.ndarray:
    if kind == "one expert":  # everything to a single device
        return np.stack([np.full(M, 5), np.full(M, 4)], 1)
    return np.stack([RNG.permutation(E)[:K] for _ in range(M)])


@pytest.mark.parametrize("room", [4.0, 2.0, 0.3])
@pytest.mark.parametrize("kind", ["even", "one expert"])
def test_nothing_is_dropped(kind, room, monkeypatch):
    monkeypatch.setattr(expert_parallel, "ROOM", room)
    experts = jnp.asarray(choices(kind), jnp.int32)
    x, w, g = (
        jnp.asarray(RNG.standard_normal(s), jnp.float32) for s in ((M, D), (E, D, D), (M, D))
    )
    weights = jnp.asarray(RNG.random((M, K)), jnp.float32)

    def plain(w, x, weights):
        each = jnp.tanh(jnp.einsum("md,mkdf->mkf", x, w[experts]))
        return ((each * weights[..., None]).sum(1) * g).sum()

    def local(w, x, weights, experts, g):
        rows = dispatch(Routing(experts, weights), E)
        assert (quota_of(rows.token.size, 4) == M // 4 * K) == (room >= 4)
        return jax.lax.psum((routed(apply, w, x, rows, weights, AXES) * g).sum(), AXES)

    mesh = make_mesh(MeshConfig(expert=2, context=2))
    spread = jax.shard_map(local, mesh=mesh, in_specs=P(AXES), out_specs=P())

    def both(w, x, weights):
        one = jax.value_and_grad(plain, argnums=(0, 1, 2))(w, x, weights)
        return one, jax.value_and_grad(spread, argnums=(0, 1, 2))(w, x, weights, experts, g)

    one, four = jit(both)(w, x, weights)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        assert np.abs(a).max() > 0.1
        np.testing.assert_allclose(b, a, atol=2e-6)  # sums of eight terms in another order


def test_exchange_is_the_ragged_one(monkeypatch):
    """Full quotas by hand, and that a GPU gets `ragged_all_to_all` if asked."""
    mesh = make_mesh(MeshConfig(context=2))

    def swap(rows, first, send, there, receive):
        into = jnp.zeros((4,), rows.dtype)
        return exchange(rows, into, first, send, there, receive, axes=("context",), quota=2)

    run = jax.jit(jax.shard_map(swap, mesh=mesh, in_specs=P("context"), out_specs=P("context")))
    numbers = (
        [[1, 2, 2], [3, 4, 0]],
        [[0, 1], [0, 1]],
        [[1, 1], [2, 0]],
        [[0, 0], [1, 0]],
        [[1, 2], [1, 0]],
    )
    arguments = [jnp.asarray(n, jnp.int32).reshape(-1) for n in numbers]
    assert run(*arguments).reshape(2, 4).tolist() == [[1, 3, 4, 0], [2, 0, 0, 0]]

    def of_a_gpu() -> str:
        again = jax.jit(lambda *x: run(*x))
        return again.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    assert "ragged_all_to_all" not in of_a_gpu()
    monkeypatch.setattr(expert_parallel, "RAGGED", True)
    jax.clear_caches()
    assert "ragged_all_to_all" in of_a_gpu()
