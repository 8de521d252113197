"""The counts of products and collectives, against programs of known cost."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from clipjax import hlo
from clipjax.hlo import Collective
from tests import gpu_program


def cost(fn, *shapes):
    compiled = jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    return hlo.cost(compiled.as_text())


@pytest.mark.parametrize(
    ("fn", "shapes", "products"),
    [
        (lambda x, y: x @ y, [(64, 96), (96, 32)], 64 * 96 * 32),
        (lambda x, y: x.T @ y, [(96, 64), (96, 32)], 64 * 96 * 32),
        (lambda x, y: x @ y, [(5, 7), (7,)], 5 * 7),
        (lambda x, y: (x * y).sum(), [(64,), (64,)], 0),
        (lambda x, y: jnp.einsum("bhqd,bhkd->bhqk", x, y), [(2, 3, 5, 16), (2, 3, 7, 16)], 2 * 3 * 5 * 7 * 16),
        (lambda x, y: jnp.tanh(jnp.exp(x) @ y + 1) @ y.T, [(300, 200), (200, 100)], 2 * 300 * 200 * 100),
    ],
    ids=["product", "transposed", "vector", "none", "batched", "fused"],
)
def test_products(fn, shapes, products):
    found = cost(fn, *shapes)
    assert found.flops == 2 * products
    assert found.collectives == {}
    assert (found.started, found.overlapped, found.uncounted) == (0, 0, ())


def test_the_gradient_of_a_dense_softmax_costs_three_products():
    def loss(x, y):
        s = jnp.einsum("id,jd->ij", x, y)
        return (jax.nn.logsumexp(s, 1) + jax.nn.logsumexp(s, 0)).mean()

    assert cost(jax.value_and_grad(loss, (0, 1)), (128, 48), (128, 48)).flops == 6 * 128**2 * 48


def test_loops_count_as_often_as_they_run():
    def nested(x, y):
        def outer(c, _):
            def inner(c, _):
                return jnp.tanh(c @ y), None

            return jax.lax.scan(inner, c @ y, length=5)[0], None

        return jax.lax.scan(outer, x, length=3)[0]

    assert cost(nested, (64, 64), (64, 64)).flops == 2 * 64**3 * 3 * (1 + 5)
    assert cost(lambda x: jax.lax.fori_loop(2, 9, lambda i, c: c @ c, x), (64, 64)).flops == 2 * 64**3 * 7


def test_a_loop_with_unknown_trip_count_is_named():
    def until(x):
        return jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: c @ c, x)

    found = cost(until, (32, 32))
    assert found.flops == 2 * 32**3
    assert len(found.uncounted) == 1


def test_of_two_branches_the_one_with_more_flops_counts():
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x + 1)

    assert cost(either, (32, 32)).flops == 2 * 2 * 32**3


@pytest.mark.parametrize("stride", [1, 2, 8])
@pytest.mark.parametrize("pad", [(0, 0), (3, 1)])
@pytest.mark.parametrize(("spread", "kernel_spread"), [(1, 1), (3, 1), (1, 2), (4, 3)])
def test_convolutions_equal_xlas_own_count(stride, pad, spread, kernel_spread):
    def conv(x, w):
        numbers = dict(
            window_strides=(stride, 1), padding=[pad, (0, 0)], lhs_dilation=(spread, 1), rhs_dilation=(kernel_spread, 2)
        )
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **numbers)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 16, 9, 3), (4, 2, 3, 8))]
    lowered = jax.jit(conv).lower(*shapes)
    assert hlo.cost(lowered.compile().as_text()).flops == lowered.cost_analysis()["flops"]


def test_collectives_of_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    def fn(x):  # [4, 16] a device
        def turn(x, _):
            return jax.lax.ppermute(x @ (x.T @ x), "data", [(i, (i + 1) % 8) for i in range(8)]), None

        x = jax.lax.scan(turn, x, length=8)[0]
        full = jax.lax.all_gather(x, "data", tiled=True)  # [32, 16]
        part = jax.lax.psum_scatter(full * full, "data", tiled=True)  # [4, 16]
        part = part + jax.lax.all_to_all(full, "data", 0, 0, tiled=True)[:4]
        return part * jax.lax.psum(part.sum(), "data")

    found = cost(fn, (32, 16))
    block = 4 * 16 * 4
    assert found.flops == 8 * 2 * (2 * 16 * 4 * 16)
    assert found.collectives == {
        "all-gather": Collective(1, 8 * block),
        "all-reduce": Collective(1, 4),
        "reduce-scatter": Collective(1, 8 * block),
        "all-to-all": Collective(1, 8 * block),
        "collective-permute": Collective(8, 8 * block),
    }


# In the form of TPU compilers: loops without a count, whose bound comes from the loop around; convolutions; started transfers.
TPU = """HloModule jit_f, is_scheduled=true

%product (p.0: f32[8,4], p.1: f32[8,4]) -> f32[8,8] {
  %p.0 = f32[8,4]{1,0:T(8,128)S(1)} parameter(0)
  %p.1 = f32[8,4]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %convolution.1 = f32[8,8]{1,0:T(8,128)} convolution(%p.0, %p.1), dim_labels=bf_oi->bf, metadata={op_name="a{b}=%c("}
}

%inner (q: (s32[], f32[8,4], s32[], s32[])) -> (s32[], f32[8,4], s32[], s32[]) {
  %q = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, s32[]{:T(128)}, /*index=3*/s32[]{:T(128)}) parameter(0)
  %q.0 = s32[]{:T(128)} get-tuple-element(%q), index=0
  %q.1 = f32[8,4]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %q.2 = s32[]{:T(128)} get-tuple-element(%q), index=2
  %q.3 = s32[]{:T(128)} get-tuple-element(%q), index=3
  %next = s32[]{:T(128)} add(%q.0, %q.2)
  %met = f32[8,8]{1,0:T(8,128)} fusion(%q.1, %q.1), kind=kOutput, calls=%product
  ROOT %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, s32[]{:T(128)}, /*index=3*/s32[]{:T(128)}) tuple(%next, %q.1, %q.2, %q.3)
}

%inner_condition (r: (s32[], f32[8,4], s32[], s32[])) -> pred[] {
  %r = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, s32[]{:T(128)}, /*index=3*/s32[]{:T(128)}) parameter(0)
  %r.0 = s32[]{:T(128)} get-tuple-element(%r), index=0
  %r.3 = s32[]{:T(128)} get-tuple-element(%r), index=3
  ROOT %less = pred[]{:T(512)} compare(%r.0, %r.3), direction=LT
}

%outer (s: (s32[], f32[8,4], s32[])) -> (s32[], f32[8,4], s32[]) {
  %s = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %s.0 = s32[]{:T(128)} get-tuple-element(%s), index=0
  %s.1 = f32[8,4]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %s.2 = s32[]{:T(128)} get-tuple-element(%s), index=2
  %one = s32[]{:T(128)} constant(1)
  %two = s32[]{:T(128)} constant(2)
  %start = (f32[8,4]{1,0:T(8,128)}, f32[8,4]{1,0}, u32[]{:S(2)}) collective-permute-start(%s.1), source_target_pairs={{0,1},{1,0}}
  %into = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, s32[]{:T(128)}, /*index=3*/s32[]{:T(128)}) tuple(%one, %s.1, %two, %s.2)
  %loop = (s32[], f32[8,4]{1,0}, s32[], /*index=3*/s32[]) while(%into), condition=%inner_condition, body=%inner
  %done = f32[8,4]{1,0:T(8,128)} collective-permute-done(%start)
  %start.2 = (f32[8,4]{1,0:T(8,128)}, f32[8,4]{1,0}, u32[]{:S(2)}) collective-permute-start(%done), source_target_pairs={{0,1}}
  %next.2 = s32[]{:T(128)} add(%s.0, %one)
  %done.2 = f32[8,4]{1,0:T(8,128)} collective-permute-done(%start.2)
  ROOT %t.2 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%next.2, %done.2, %s.2)
}

%outer_condition (u: (s32[], f32[8,4], s32[])) -> pred[] {
  %u = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %u.0 = s32[]{:T(128)} get-tuple-element(%u), index=0
  %three = s32[]{:T(128)} constant(3)
  ROOT %less.2 = pred[]{:T(512)} compare(%u.0, %three), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %copied = s32[]{:T(128)} copy(%zero)
  %eight = s32[]{:T(128)} constant(8)
  %into.2 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%copied, %x, %eight)
  %loop.2 = (s32[]{:T(128)}, f32[8,4]{1,0}, s32[]{:T(128)}) while(%into.2), condition=%outer_condition, body=%outer
  ROOT %end = f32[8,4]{1,0:T(8,128)} get-tuple-element(%loop.2), index=1
}
"""


def test_a_tpu_program():
    found = hlo.cost(TPU)
    assert found.flops == 3 * 4 * (2 * 8 * 8 * 4)  # 1, 3, 5, 7 < 8: four iterations of the inner loop
    assert found.collectives == {"collective-permute": Collective(6, 6 * 128)}
    assert (found.started, found.overlapped, found.uncounted) == (2, 1, ())


PIECES = """HloModule jit_f, is_scheduled=true, num_partitions=8

%start (p: f32[8,4]) -> (f32[8,4], f32[64,4]) {
  %p = f32[8,4]{1,0} parameter(0)
  %gather.1 = f32[64,4]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %begun = (f32[8,4]{1,0}, f32[64,4]{1,0}) custom-call(%p, %gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece (q: f32[8,4], q.1: f32[8,8]) -> f32[8,8] {
  %q = f32[8,4]{1,0} parameter(0)
  %q.1 = f32[8,8]{1,0} parameter(1)
  %gather.2 = f32[64,4]{1,0} all-gather(%q), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %dot.1 = f32[8,8]{1,0} dot(%q.1, %q.1), lhs_contracting_dims={1}, operand_precision={highest,highest}
}

%end (w: f32[8,4]) -> f32[64,4] {
  %w = f32[8,4]{1,0} parameter(0)
  %gather.3 = f32[64,4]{1,0} all-gather(%w), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %ended = f32[64,4]{1,0} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

%body (r: (s32[], f32[8,4], f32[8,8])) -> (s32[], f32[8,4], f32[8,8]) {
  %r = (s32[], f32[8,4]{1,0}, f32[8,8]{1,0}) parameter(0)
  %r.0 = s32[] get-tuple-element(%r), index=0
  %r.1 = f32[8,4]{1,0} get-tuple-element(%r), index=1
  %r.2 = f32[8,8]{1,0} get-tuple-element(%r), index=2
  %worked = f32[8,8]{1,0} fusion(%r.1, %r.2), kind=kOutput, calls=%piece
  ROOT %t = (s32[], f32[8,4]{1,0}, f32[8,8]{1,0}) tuple(%r.0, %r.1, %worked)
}

%more (u: (s32[], f32[8,4], f32[8,8])) -> pred[] {
  %u = (s32[], f32[8,4]{1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%cut (v: f32[5,8,8], v.1: s32[], v.2: f32[5,8,8]) -> f32[5,8,8] {
  %v = f32[5,8,8]{2,1,0} parameter(0)
  %v.1 = s32[] parameter(1)
  %v.2 = f32[5,8,8]{2,1,0} parameter(2)
  %nought = s32[] constant(0)
  %one = f32[1,8,8]{2,1,0} dynamic-slice(%v, %v.1, %nought, %nought), dynamic_slice_sizes={1,8,8}
  ROOT %put = f32[5,8,8]{2,1,0} dynamic-update-slice(%v.2, %one, %v.1, %nought, %nought)
}

ENTRY %main (x: f32[8,4], y: f32[8,8], z: f32[5,8,8], n: s32[]) -> f32[] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %z = f32[5,8,8]{2,1,0} parameter(2)
  %n = s32[] parameter(3)
  %started = (f32[8,4]{1,0}, f32[64,4]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %into = (s32[], f32[8,4]{1,0}, f32[8,8]{1,0}) tuple(%n, %x, %y)
  %loop = (s32[], f32[8,4]{1,0}, f32[8,8]{1,0}) while(%into), body=%body, condition=%more, "known_trip_count":{"n":"5"}
  %gathered = f32[64,4]{1,0} fusion(%x), kind=kCustom, calls=%end
  %near = f32[8,8]{1,0} all-reduce(%y), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %far = f32[8,8]{1,0} all-reduce(%near), channel_id=3, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %moved = f32[5,8,8]{2,1,0} fusion(%z, %n, %z), kind=kLoop, calls=%cut
}
"""


def test_a_transfer_in_pieces_counts_once():
    found = hlo.cost(PIECES)
    gathered, square = 64 * 4 * 4, 8 * 8 * 4
    assert found.collectives == {"all-gather": Collective(1, gathered), "all-reduce": Collective(2, 2 * square)}
    assert (found.sent_bytes, found.sent_between_slices) == (gathered + 2 * 2 * square, 0)
    assert (found.started, found.overlapped) == (1, 1)  # by the product in the fusion with its second piece
    idle = hlo.cost(PIECES.replace("dot(%q.1, %q.1)", "add(%q.1, %q.1)"))
    assert (idle.started, idle.overlapped) == (1, 0)


def test_transfers_between_slices_count_separately():
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="PAIR",_xla_megascale_transfer_type="KIND"}'
    )
    transfers = "".join(
        f"""
  %send.{n} = (f32[{given}], u32[], token[]) send(%{array}, %token), channel_id={n}, {attributes}
  %recv.{n} = (f32[{taken}]{{0}}, u32[], token[]) recv(%token), channel_id=1{n}, {attributes}
""".replace("PAIR", f"pair.{n}").replace("KIND", kind)
        for n, (array, given, taken, kind) in enumerate(
            [("x", "8,4", "16,4", "ALL_GATHER"), ("y", "8,8", "4,8", "REDUCE_SCATTER"), ("x", "8,4", "16,4", "ALL_GATHER")]
        )
    )
    found = hlo.cost(PIECES.replace("  %near =", f"  %token = token[] after-all(){transfers}\n  %near ="))
    larger, square = 16 * 4 * 4, 8 * 8 * 4
    assert found.collectives["all-gather between slices"] == Collective(2, 2 * larger)
    assert found.collectives["reduce-scatter between slices"] == Collective(1, square)
    alone = hlo.cost(PIECES)
    assert found.sent_between_slices == 2 * larger + square
    assert (found.sent_bytes, found.memory_bytes) == (alone.sent_bytes, alone.memory_bytes)


NESTED = """
HloModule nested

%inner (all: bf16[13,16,64], at: s32[]) -> f32[16,64] {
  %all = bf16[13,16,64]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,16,64]{2,1,0} dynamic-slice(%all, %at, %zero, %zero), dynamic_slice_sizes={1,16,64}
  %row = bf16[16,64]{1,0} bitcast(%slice)
  ROOT %wide = f32[16,64]{1,0} convert(%row)
}

%outer (every: bf16[13,16,64], which: s32[], y: f32[64,8]) -> f32[16,8] {
  %every = bf16[13,16,64]{2,1,0} parameter(0)
  %which = s32[] parameter(1)
  %y = f32[64,8]{1,0} parameter(2)
  %taken = f32[16,64]{1,0} fusion(%every, %which), kind=kLoop, calls=%inner
  ROOT %dot = f32[16,8]{1,0} dot(%taken, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (stack: bf16[13,16,64], n: s32[], w: f32[64,8]) -> f32[16,8] {
  %stack = bf16[13,16,64]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %w = f32[64,8]{1,0} parameter(2)
  ROOT %product = f32[16,8]{1,0} fusion(%stack, %n, %w), kind=kOutput, calls=%outer
}
"""


def test_a_fusion_in_a_fusion_reads_its_slice_alone():
    assert hlo.cost(NESTED).memory_bytes == 2 * 16 * 64 + 4 + 4 * 64 * 8 + 4 * 16 * 8


def test_float32_products_take_a_tpu_six_passes():
    found = hlo.cost(PIECES)
    assert found.flops == 5 * 2 * 8**3
    assert found.tpu_flops == 6 * found.flops
    assert hlo.cost(PIECES.replace("highest", "high")).tpu_flops == 3 * found.flops
    assert hlo.cost(PIECES.replace("highest", "default")).tpu_flops == found.flops


def test_memory_is_read_and_written_at_the_ends_of_a_fusion():
    square, row = 8 * 8 * 4, 8 * 4 * 4
    reduced = 2 * 2 * square
    gathered = 64 * 4 * 4
    start, piece, done = row + row + gathered, row + square + square, row + gathered
    moved = 2 * square + 4  # a slice from one array into another, not the arrays; and its position
    found = hlo.cost(PIECES)
    assert found.memory_bytes == start + 5 * piece + done + reduced + moved
    fast = PIECES.replace("%worked = f32[8,8]{1,0}", "%worked = f32[8,8]{1,0:T(8,128)S(1)}")  # in a TPU's vector memory
    assert hlo.cost(fast).memory_bytes == found.memory_bytes - 5 * square


@pytest.mark.parametrize("target", ["__onednn$matmul", "__cublas$gemm", "__cublas$lt$matmul"])
def test_products_of_libraries(target):
    text = f"""HloModule m
ENTRY %main (x: bf16[3,8,4], y: bf16[3,16,8]) -> bf16[3,4,16] {{
  %x = bf16[3,8,4]{{2,1,0}} parameter(0)
  %y = bf16[3,16,8]{{2,1,0}} parameter(1)
  %z = (bf16[3,4,16]{{2,1,0}}, s8[64]{{0}}) custom-call(%x, %y), custom_call_target="{target}"
  ROOT %out = bf16[3,4,16]{{2,1,0}} get-tuple-element(%z), index=0
}}
"""
    assert hlo.cost(text).flops == 2 * 3 * 4 * 16 * 8
    assert hlo.cost(text).memory_bytes == 2 * 3 * (8 * 4 + 16 * 8 + 4 * 16)  # s8[64] is room for the library
    assert hlo.cost(text.replace(target, "Sharding")).flops == 0


def test_a_gpu_program():
    """What the compiler wrote for four H100s: products of cuBLAS in loops, sums of gradients that are started and awaited."""
    found = hlo.cost(gpu_program.TEXT.read_text())
    assert found.flops == gpu_program.PRODUCTS
    assert found.collectives == {"all-reduce": Collective(5, gpu_program.SUMMED)}  # two arrays, one layer by layer; and the loss
    assert (found.started, found.overlapped, found.uncounted) == (3, 1, ())
    assert found.memory_bytes < 27 * 2**22  # the room of as many products


# Of clip_b16's step for an H100, shortened: the place of the largest token, and a mask of the tokens; and a product of Triton.
FUSIONS = """HloModule m

%larger (a: s32[], b: s32[], c: s32[], d: s32[]) -> (s32[], s32[]) {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  %c = s32[] parameter(2)
  %d = s32[] parameter(3)
  ROOT %both = (s32[], s32[]) tuple(%a, %b)
}

%fused_and_reduce (p: s32[256,77]) -> ((s32[256], s32[256]), pred[256,77]) {
  %p = s32[256,77]{1,0} parameter(0)
  %place = s32[256,77]{1,0} iota(), iota_dimension=1
  %least = s32[] constant(-2147483648)
  %nought = s32[] constant(0)
  %reduce.138.1 = (s32[256]{0}, s32[256]{0}) reduce(%p, %place, %least, %nought), dimensions={1}, to_apply=%larger
  %noughts = s32[256,77]{1,0} broadcast(%nought), dimensions={}
  %mask = pred[256,77]{1,0} compare(%p, %noughts), direction=GE
  ROOT %out = ((s32[256]{0}, s32[256]{0}), pred[256,77]{1,0}) tuple(%reduce.138.1, %mask)
}

%gemm_fusion_dot_computation (q: bf16[128,512], r: bf16[128,512]) -> bf16[512,512] {
  %q = bf16[128,512]{1,0} parameter(0)
  %r = bf16[128,512]{1,0} parameter(1)
  ROOT %dot.2 = bf16[512,512]{1,0} dot(%q, %r), lhs_contracting_dims={0}, rhs_contracting_dims={0}, backend_config={"sizes":["16"]}
}

ENTRY %main (tokens: s32[256,77], x: bf16[128,512]) -> bf16[512,512] {
  %tokens = s32[256,77]{1,0} parameter(0)
  %x = bf16[128,512]{1,0} parameter(1)
  %pooled = ((s32[256]{0}, s32[256]{0}), pred[256,77]{1,0}) fusion(%tokens), kind=kInput, calls=%fused_and_reduce
  ROOT %gemm_fusion_dot = bf16[512,512]{1,0} fusion(%x, %x), kind=kCustom, calls=%gemm_fusion_dot_computation, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
}
"""  # noqa: E501


def test_fusions_of_a_gpu():
    found = hlo.cost(FUSIONS)
    assert found.flops == 2 * 512 * 512 * 128
    assert found.memory_bytes == (4 * 256 * 77 + 2 * 4 * 256 + 256 * 77) + 2 * (2 * 128 * 512 + 512 * 512)


@pytest.mark.parametrize(("backward", "products"), [("", 2), ("Backward", 5)])
def test_attention_of_cudnn(backward, products):
    """Scores and values; backward the scores again, and the gradients of weights, values, queries and keys."""
    shape = 'fmha_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["4", "8", "64", "80"]'
    text = f"""HloModule m
ENTRY %main (q: bf16[4,64,8,32], k: bf16[4,80,8,32]) -> bf16[4,8,64,32] {{
  %q = bf16[4,64,8,32]{{3,2,1,0}} parameter(0)
  %k = bf16[4,80,8,32]{{3,2,1,0}} parameter(1)
  %z = (bf16[4,8,64,32]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax{backward}", backend_config={{"{shape}, "tuple_shapes": []}}, "is_dynamic_dimension": [false], "bmm1_dot": {{"lhs_contracting_dimensions": ["3"]}}}}}}
  ROOT %out = bf16[4,8,64,32]{{3,1,2,0}} get-tuple-element(%z), index=0
}}
"""  # noqa: E501
    assert hlo.cost(text).flops == products * 2 * 4 * 8 * 64 * 80 * 32


def test_bytes():
    assert (
        hlo.byte_count("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0}, pred[5]{0}, s4[6]{0}, f8e4m3fn[7]{0}, token[])")
        == 24 + 8 + 5 + 3 + 7
    )
    assert hlo.byte_count("f32[]") == 4
