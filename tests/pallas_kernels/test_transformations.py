"""The ops under jit, vmap, remat and shard_map: the same numbers, and no more work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_kernels as ops
from pallas_kernels import KeyRange

OPTIONS = {"scale": op_cases.SCALE}
# Reductions over another order of the same fp32 terms.
FP32 = {"rtol": 2e-5, "atol": 5e-6}


def everything(case, implementation, workspace_bytes=op_cases.BUDGET):
    """Every differentiable op once, on the selection of the indexer."""
    shared = {"implementation": implementation, "workspace_bytes": workspace_bytes}
    selection = ops.lightning_indexer(
        case.iq, case.ik, case.iw, case.ranges, topk=op_cases.K, **shared
    )
    scores = ops.indexer_scores(case.iq, case.ik, case.iw, case.ranges, **shared)
    again = ops.select_topk(scores, case.ranges, topk=op_cases.K, **shared)
    attend = functools.partial(ops.sparse_attention, value_width=op_cases.C, **OPTIONS, **shared)
    out, lse = attend(case.q, case.kv, selection)
    dense_out, dense_lse = ops.dense_attention(
        case.qd, case.k, case.v, case.ranges, **OPTIONS, **shared
    )
    indexer = (case.iq, case.ik, case.iw)
    sparse = ops.indexer_kl_sparse(*indexer, case.q, case.kv, lse, selection, **OPTIONS, **shared)
    dense = ops.indexer_kl_dense(
        *indexer, case.qd, case.k, dense_lse, case.ranges, **OPTIONS, **shared
    )
    floats = (scores, out, lse, dense_out, dense_lse, sparse, dense)
    return (selection.indices, again.indices), floats


def loss(floats):
    """A different weight for every entry, and nothing from the -inf."""
    total = 0.0
    for x in floats:
        weight = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        total += (jnp.where(jnp.isfinite(x), x, 0.0) * weight).sum()
    return total


def with_gradients(case, implementation, wrap=lambda fn: fn):
    """All results, and the gradients of all float arguments."""
    floats = {name: x for name, x in case._asdict().items() if name not in ("ranges", "selection")}

    def total(floats):
        found = wrap(lambda case: everything(case, implementation))(case._replace(**floats))
        return loss(found[1]), found

    (_, found), gradients = jax.value_and_grad(total, has_aux=True)(floats)
    return found, gradients


def assert_equal(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **(tolerance or FP32))


def test_jit_changes_nothing(implementation):
    case = op_cases.case("packed")
    plain = everything(case, implementation)
    jitted = jax.jit(everything, static_argnums=1)(case, implementation)
    np.testing.assert_array_equal(plain[0][0], jitted[0][0])
    assert_equal(plain, jitted)


@pytest.mark.parametrize("workspace_bytes", ["all"], indirect=True)
def test_vmap_over_the_batch(implementation, workspace_bytes):
    """Rows mapped one by one equal rows taken together, gradients included."""
    case = op_cases.case("packed")
    rows = jax.tree.map(lambda x: x[:, None], case)

    def run(case):
        def total(arrays):
            found = everything(case._replace(**arrays), implementation, workspace_bytes)
            return loss(found[1]), found

        arrays = {"iq": case.iq, "ik": case.ik, "q": case.q, "kv": case.kv, "k": case.k}
        (_, found), gradients = jax.value_and_grad(total, has_aux=True)(arrays)
        return found, gradients

    mapped = jax.jit(jax.vmap(run))(rows)
    one = jax.jit(run)
    alone = [one(jax.tree.map(lambda x, b=b: x[b : b + 1], case)) for b in range(op_cases.B)]
    assert_equal(mapped, jax.tree.map(lambda *x: jnp.stack(x), *alone))


def test_remat(implementation):
    case = op_cases.case("packed")
    plain = jax.jit(lambda case: with_gradients(case, implementation))(case)
    again = jax.jit(lambda case: with_gradients(case, implementation, jax.checkpoint))(case)
    assert_equal(plain, again)


def calls_of(jaxpr, name) -> int:
    """How often a program calls the jitted function of that name, inner programs included."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.params.get("name") == name
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    count += calls_of(inner, name)
    return count


def test_saved_names_spare_the_recomputation():
    """With the selection, out and lse saved, remat runs neither indexer nor attention again."""
    case = op_cases.case("packed")

    def layer(q, kv, iq):
        selection = ops.lightning_indexer(
            jnp.sin(iq), case.ik, case.iw, case.ranges, topk=op_cases.K, implementation="xla"
        )
        out, _ = ops.sparse_attention(
            jnp.sin(q), kv, selection, value_width=op_cases.C, implementation="xla", **OPTIONS
        )
        return (out**2).sum()

    def count(name, *saved):
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        gradient = jax.value_and_grad(jax.checkpoint(layer, policy=policy))
        return calls_of(jax.make_jaxpr(gradient)(case.q, case.kv, case.iq).jaxpr, name)

    names = ("lightning_indexer.indices", "sparse_attention.out", "sparse_attention.lse")
    assert count("lightning_indexer") == 2
    assert count("forward") == 2
    assert count("lightning_indexer", *names) == 1
    assert count("forward", *names) == 1
    assert count("backward", *names) == 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, implementation):
    """Rows over one axis and queries over another, each device with all keys of its rows.

    The keys are replicated over the queries' axis, so their gradients are sums over it.
    """
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh(
        (2, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    case = op_cases.case("packed")
    twelve = {
        name: jax.tree.map(lambda x: x[:, :12], getattr(case, name))
        for name in ("ranges", "iq", "iw", "q", "qd", "selection")
    }
    case = case._replace(**twelve)
    by_query, by_row = P("data", "context"), P("data")
    keys = ("ik", "kv", "k", "v")
    specs = case._replace(**{n: by_row if n in keys else by_query for n in case._fields})
    specs = specs._replace(ranges=KeyRange(by_query, by_query))
    sharded = jax.shard_map(
        # A budget of one byte: the loops too must run inside shard_map.
        lambda case: everything(case, implementation, 1),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=by_query,
        check_vma=check_vma,
    )

    def both(run):
        def total(arrays):
            found = run(case._replace(**arrays))
            return loss(found[1]), found

        arrays = {n: getattr(case, n) for n in ("iq", "ik", "iw", "q", "kv", "qd", "k", "v")}
        (_, found), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)
        return found, gradients

    assert_equal(both(sharded), both(lambda case: everything(case, implementation)))
