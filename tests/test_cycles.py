"""`hlo.cycles`: the TPU compiler's estimates, added up by hand on short programs."""

import pytest

from clipjax import hlo
from clipjax.chips import Chip, chip_of
from clipjax.hlo.cycles import part_of

V5E = chip_of("TPU v5 lite")


def cycles(text, chip=V5E) -> hlo.Cycles:
    found = hlo.cycles(text, chip)
    assert found is not None
    return found


def costs(count: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}","iteration_bounds":["1"]}}}}'


PROGRAM = f"""HloModule jit_f, is_scheduled=true

%product (a: bf16[8,8]) -> bf16[8,8] {{
  %a = bf16[8,8]{{1,0}} parameter(0)
  %dot = bf16[8,8]{{1,0}} dot(%a, %a), lhs_contracting_dims={{1}}, metadata={{op_name="jit(f)/jvp(image)/dot_general"}}, {costs(999)}
  ROOT %put = bf16[8,8]{{1,0}} add(%dot, %dot), metadata={{op_name="jit(f)/jvp(image)/dynamic_update_slice"}}, {costs(999)}
}}

%inner (q: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {{
  %q = (s32[], bf16[8,8]{{1,0}}) parameter(0)
  %q.0 = s32[] get-tuple-element(%q), index=0
  %q.1 = bf16[8,8]{{1,0}} get-tuple-element(%q), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%q.0, %two)
  %met = bf16[8,8]{{1,0}} fusion(%q.1), kind=kOutput, calls=%product, metadata={{op_name="jit(f)/jvp(image)/dynamic_update_slice"}}, {costs(7)}
  ROOT %t = (s32[], bf16[8,8]{{1,0}}) tuple(%next, %met)
}}

%inner_condition (r: (s32[], bf16[8,8])) -> pred[] {{
  %r = (s32[], bf16[8,8]{{1,0}}) parameter(0)
  %r.0 = s32[] get-tuple-element(%r), index=0
  %seven = s32[] constant(7)
  ROOT %less = pred[] compare(%r.0, %seven), direction=LT
}}

%outer (s: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {{
  %s = (s32[], bf16[8,8]{{1,0}}) parameter(0)
  %s.0 = s32[] get-tuple-element(%s), index=0
  %s.1 = bf16[8,8]{{1,0}} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %into = (s32[], bf16[8,8]{{1,0}}) tuple(%one, %s.1)
  %loop = (s32[], bf16[8,8]{{1,0}}) while(%into), condition=%inner_condition, body=%inner
  %out = bf16[8,8]{{1,0}} get-tuple-element(%loop), index=1
  %normed = bf16[8,8]{{1,0}} fusion(%out), kind=kLoop, calls=%scaled, metadata={{op_name="jit(f)/jvp(image)/while/body/norm/mul"}}, {costs(50)}
  ROOT %t.2 = (s32[], bf16[8,8]{{1,0}}) tuple(%s.0, %normed)
}}

%dear (d: bf16[8,8]) -> bf16[8,8] {{
  %d = bf16[8,8]{{1,0}} parameter(0)
  ROOT %d.1 = bf16[8,8]{{1,0}} add(%d, %d), metadata={{op_name="jit(f)/add"}}, {costs(1000)}
}}

%cheap (e: bf16[8,8]) -> bf16[8,8] {{
  %e = bf16[8,8]{{1,0}} parameter(0)
  ROOT %e.1 = bf16[8,8]{{1,0}} add(%e, %e), metadata={{op_name="jit(f)/jvp(text)/dot_general"}}, {costs(10)}
}}

ENTRY %main (x: bf16[8,8], n: pred[]) -> bf16[8,8] {{
  %x = bf16[8,8]{{1,0}} parameter(0)
  %n = pred[] parameter(1)
  %start = (bf16[8,8]{{1,0}}, bf16[8,8]{{1,0}}, u32[]) copy-start(%x)
  %zero = s32[] constant(0)
  %into.2 = (s32[], bf16[8,8]{{1,0}}) tuple(%zero, %x)
  %loop.2 = (s32[], bf16[8,8]{{1,0}}) while(%into.2), condition=%more, body=%outer, backend_config={{"known_trip_count":{{"n":"5"}}}}
  %done = bf16[8,8]{{1,0}} copy-done(%start)
  %kernel = bf16[8,8]{{1,0}} custom-call(%done, %x), custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/jvp(image)/attention/pallas_call"}}, backend_config={{"custom_call_config":{{"cost_estimate":{{"flops":"FLOPS","bytes_accessed":"1"}}}}}}
  ROOT %end = bf16[8,8]{{1,0}} conditional(%n, %kernel, %kernel), true_computation=%cheap, false_computation=%dear
}}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run_and_of_a_conditional_the_dearest_branch():
    found = cycles(PROGRAM)
    kernel = 3 * 128 / 819e9 * 1.5e9  # two operands and a result of 128 bytes; FLOPs are not given
    assert found.parts == {
        "products": 5 * 3 * 7,  # 1, 3, 5 < 7; the product in the fusion says so, not the slice at its end
        "norms": 5 * 50,
        "optimizer and norms": 1000,
        "attention scores": pytest.approx(kernel),
    }
    assert found.total == pytest.approx(1355 + kernel)
    assert found.uncosted == {"add": 15, "copy-start": 1, "copy-done": 1}


def test_a_kernel_takes_what_its_flops_or_its_bytes_take():
    def attention(chip, flops):
        return cycles(PROGRAM.replace("FLOPS", str(flops)), chip).parts["attention scores"]

    moved = 3 * 128 / 819e9 * 1.5e9
    assert attention(V5E, 1000) == pytest.approx(moved)
    assert attention(V5E, 10**6) == pytest.approx(10**6 / 197e12 * 1.5e9)
    half = Chip(197e12, 819e9, None, None, 0, devices=2, clock=1.5e9)  # a device has half of a chip's rates
    assert attention(half, 10**6) == pytest.approx(2 * 10**6 / 197e12 * 1.5e9)


def test_a_kernel_for_a_chip_with_an_unknown_clock_is_listed():
    found = cycles(PROGRAM, Chip(197e12, 819e9, None, None, 0))
    assert "attention scores" not in found.parts
    assert found.uncosted["custom-call"] == 1


def test_a_loop_of_unknown_length_is_told():
    unknown = PROGRAM.replace("%seven = s32[] constant(7)", "%seven = s32[] custom-call()")
    found = cycles(unknown)
    assert found.uncosted["while"] == 5
    assert found.parts["products"] == 5 * 7


@pytest.mark.parametrize(
    ("kind", "units", "size"),
    [
        *(("TPU v2", 2, 128), ("TPU v3", 4, 128), ("TPU v4", 8, 128), ("TPU v5 lite", 4, 128), ("TPU v5p", 8, 128)),
        ("TPU v6 lite", 4, 256),
    ],
)
def test_clocks_are_those_of_the_peaks(kind, units, size):
    chip = chip_of(kind)
    assert chip is not None
    assert chip.clock is not None
    assert units * size**2 * 2 * chip.clock == pytest.approx(chip.flops, rel=0.01)


def test_programs_for_others_have_no_cycles():
    assert hlo.cycles(PROGRAM.replace("estimated_cycles", "x"), None) is None


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(f)/jvp()/shard_map/image/while/body/dot_general", "elementwise and other"),  # a cast inside a product's name
        ("jit(f)/transpose(jvp(image))/while/body/attention/exp", "attention scores"),
        ("jit(f)/transpose(jvp(image))/while/body/norm/reduce_sum", "norms"),
        ("jit(f)/jvp(image)/while/body/jit(dynamic_index_in_dim)/squeeze", "stacking and slicing"),
        ("jit(f)/image/while/body/tanh", "elementwise and other"),  # not differentiated: the first pass of micro-batches
        ("jit(f)/transpose(jvp(text))/while/body/norm/reduce_sum", "text tower"),
        ("jit(f)/jvp(loss)/shard_map/dot_general", "loss"),
        ("jit(f)/norm/reduce_sum", "optimizer and norms"),  # of the step
        ("batch[\\'text\\']", "optimizer and norms"),
    ],
)
def test_parts_by_name(op_name, part):
    assert part_of(op_name, "fusion", product=False) == part


def test_what_the_compiler_makes_itself_is_told_by_its_opcode():
    assert part_of("", "copy", product=False) == "stacking and slicing"
    assert part_of("", "convert", product=False) == "elementwise and other"
