"""What is read from a compiled program: collectives by axis, loops, products, memory traffic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsa_jax.sharding import MeshConfig, make_mesh
from train.plan import hlo
from train.plan.collectives import axes_of, collectives, replica_groups
from train.plan.options import mesh_sizes

MESH = MeshConfig(fsdp=2, expert=2, context=2)
LAYERS = 5


@pytest.fixture(scope="module")
def program():
    """A scan of five layers, each with one collective of every kind, on two axes and on four."""

    def layer(x, w):
        whole = lax.all_gather(w, ("fsdp", "expert"), tiled=True)  # [64, 32]
        y = jnp.tanh(x @ whole)
        y = lax.psum(y, "context")
        y = y + lax.psum_scatter(jnp.tile(y, (4, 1)), ("fsdp", "expert"), tiled=True)
        y = lax.all_to_all(y.reshape(2, 4, 32), "expert", 0, 0).reshape(8, 32)
        return jnp.concatenate([y, lax.ppermute(y, "context", [(0, 1), (1, 0)])], 1), None

    def run(x, stack):
        return lax.scan(layer, x, stack)[0]

    mesh = make_mesh(MESH)
    spec = (P(("fsdp", "expert"), None), P(None, ("fsdp", "expert"), None))
    run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec[0], check_vma=False)
    shapes = ((32, 64), (LAYERS, 64, 32))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, one))
        for shape, one in zip(shapes, spec, strict=True)
    ]
    return hlo.parse(jax.jit(run).lower(*arguments).compile().as_text() or "")


def test_collectives_are_known_by_op_axes_and_bytes(program):
    traffic = collectives(program, mesh_sizes(MESH))
    found = {(one.op, one.axes): (one.calls, one.bytes_sent) for one in traffic}
    row = 32 * 4
    assert found == {
        ("all-gather", ("fsdp", "expert")): (LAYERS, LAYERS * 3 * 16 * row),
        ("all-reduce", ("context",)): (LAYERS, LAYERS * 2 * 8 * row / 2),
        ("reduce-scatter", ("fsdp", "expert")): (LAYERS, LAYERS * 32 * row * 3 / 4),
        ("all-to-all", ("expert",)): (LAYERS, LAYERS * 8 * row / 2),
        ("collective-permute", ("context",)): (LAYERS, LAYERS * 8 * row),
    }


def test_products_count_as_often_as_the_loop_runs(program):
    assert program.unknown_loops == 0
    assert hlo.work(program).dot_flop == LAYERS * 2 * 8 * 64 * 32


CALLS = """
ENTRY %main (a: bf16[3,8,4], b: bf16[3,4,16]) -> f32[3,8,16] {
  %a = bf16[3,8,4]{2,1,0} parameter(0)
  %b = bf16[3,4,16]{2,1,0} parameter(1)
  %lt = (f32[3,8,16]{2,1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_batch_dimensions":["0"],"lhs_contracting_dimensions":["2"]}}}
  %gemm = (f32[3,8,16]{2,1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_batch_dimensions":["0"],"lhs_contracting_dimensions":["2"]}}}
  %kernel = f32[3,8,16]{2,1,0} custom-call(%a, %b), custom_call_target="mosaic_gpu_v2"
  ROOT %out = f32[3,8,16]{2,1,0} get-tuple-element(%lt), index=0
}
"""  # noqa: E501


def test_products_by_cublas_count():
    found = hlo.work(hlo.parse(CALLS))
    assert found.dot_flop == 2 * (2 * 3 * 8 * 4 * 16)
    assert found.kernels == {"mosaic_gpu_v2": 1}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_every_way_to_write_groups(text, groups):
    assert replica_groups(text, 4).tolist() == groups


def test_a_part_of_an_axis_is_told_apart_from_the_axis():
    mesh = {"data": 2, "fsdp": 4}
    assert axes_of(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), mesh) == (("fsdp",), True)
    assert axes_of(np.array([[0, 1], [2, 3]]), mesh) == (("fsdp",), False)
    assert axes_of(np.array([[0, 4]]), mesh) == (("data",), True)
    assert axes_of(np.array([range(8)]), mesh) == (("data", "fsdp"), True)


SLICES = """
HloModule m

%fused (p0: f32[58,16], p1: s32[]) -> f32[1,16] {
  %p0 = f32[58,16]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %c = s32[] constant(0)
  ROOT %s = f32[1,16]{1,0} dynamic-slice(%p0, %p1, %c), dynamic_slice_sizes={1,16}
}

%update (q0: f32[58,16], q1: f32[1,16], q2: s32[]) -> f32[58,16] {
  %q0 = f32[58,16]{1,0} parameter(0)
  %q1 = f32[1,16]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %u = f32[58,16]{1,0} dynamic-update-slice(%q0, %q1, %q2, %q2)
}

ENTRY %main (a: f32[58,16], i: s32[]) -> f32[58,16] {
  %a = f32[58,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,16]{1,0} fusion(%a, %i), kind=kLoop, calls=%fused
  ROOT %all = f32[58,16]{1,0} fusion(%a, %one, %i), kind=kLoop, calls=%update
}
"""


def test_a_slice_of_a_stack_moves_the_slice_and_not_the_stack():
    layer, index = 16 * 4, 4
    read, write = 2 * layer + index, layer + layer + layer + index
    assert hlo.work(hlo.parse(SLICES)).other_bytes == read + write


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty")


NESTED = """
HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %start = f32[8,4]{1,0} all-reduce-start(%x), replica_groups=[1,8]<=[8], to_apply=%sum
  %done = f32[8,4]{1,0} all-reduce-done(%start)
  %kernel = f32[8,4]{1,0} custom-call(%done), custom_call_target="mosaic_gpu_v2"
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %kernel)
}

%outer (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,4]{1,0}) while(%p), condition=%c, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %once = (s32[], f32[8,4]{1,0}) while(%p), condition=%c, body=%inner
  ROOT %w = (s32[], f32[8,4]{1,0}) while(%once), condition=%c, body=%outer, \
backend_config={"known_trip_count":{"n":"7"}}
}
"""


def test_loops_in_loops_multiply_and_what_runs_aside_counts_once():
    program = hlo.parse(NESTED)
    runs = 3 * 7 + 1  # and one of a loop of unknown length
    assert program.unknown_loops == 1
    (one,) = collectives(program, {"data": 8})
    assert (one.op, one.calls) == ("all-reduce", runs)
    assert one.bytes_sent == runs * 2 * 7 / 8 * 8 * 4 * 4
    found = hlo.work(program)
    assert found.kernels == {"mosaic_gpu_v2": runs}
    assert found.matmul_bytes == runs * 2 * 8 * 4 * 4
    assert found.other_bytes == 0, "a collective is not the memory's traffic"
