"""What is read from the text of an optimised program."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.probing import tpu_compiler, tpu_estimate

PROGRAM = """HloModule step, is_scheduled=true

%fused_conv (a: bf16[4,128], b: bf16[128,128]) -> bf16[4,128] {
  %a = bf16[4,128]{1,0:T(8,128)} parameter(0)
  %b = bf16[128,128]{1,0:T(8,128)} parameter(1)
  ROOT %dot = bf16[4,128]{1,0:T(8,128)} convolution(%a, %b), dim_labels=bf_io->bf
}

%fused_gather (t: f32[9,128], i: s32[8]) -> f32[8,128] {
  %t = f32[9,128]{1,0:T(8,128)} parameter(0)
  %i = s32[8]{0:T(128)} parameter(1)
  ROOT %g = f32[8,128]{1,0:T(8,128)} gather(%t, %i), offset_dims={1}, slice_sizes={1,128}
}

%body (p: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %p = (s32[], bf16[4,128]{1,0:T(8,128)}) parameter(0)
  %x = bf16[4,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %slow = bf16[4,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%f, metadata={op_name="slow/add"}, backend_config={"estimated_cycles":"1500000"}
  ROOT %r = (s32[], bf16[4,128]{1,0:T(8,128)}) tuple(%x, %slow)
}

%cheap (q: f32[8,128]) -> f32[8,128] {
  ROOT %c1 = f32[8,128]{1,0:T(8,128)} add(%q, %q), backend_config={"estimated_cycles":"1500"}
}

%dear (q: f32[8,128]) -> f32[8,128] {
  ROOT %c2 = f32[8,128]{1,0:T(8,128)} add(%q, %q), backend_config={"estimated_cycles":"3000"}
}

%under_four (p: (f32[8,128], s32[])) -> pred[] {
  %q = (f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %four = s32[] constant(4)
  %i = s32[] get-tuple-element(%q), index=1
  ROOT %less = pred[] compare(%i, %four), direction=LT
}

%under_some (p: (f32[8,128], s32[])) -> pred[] {
  %q2 = (f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %i2 = s32[] get-tuple-element(%q2), index=1
  %some = s32[] add(%i2, %i2)
  ROOT %less2 = pred[] compare(%i2, %some), direction=LT
}

%turn (p: (f32[8,128], s32[])) -> (f32[8,128], s32[]) {
  %p3 = (f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  ROOT %c3 = f32[8,128]{1,0:T(8,128)} add(%p3, %p3), backend_config={"estimated_cycles":"3000"}
}

ENTRY %main (w: bf16[128,128], y: bf16[4,128]) -> bf16[4,128] {
  %w = bf16[128,128]{1,0:T(8,128)} parameter(0)
  %y = bf16[4,128]{1,0:T(8,128)} parameter(1)
  %conv = bf16[4,128]{1,0:T(8,128)} fusion(%y, %w), kind=kOutput, calls=%fused_conv, metadata={op_name="layer/Conv2D"}, backend_config={"estimated_cycles":"15000"}
  %loop = (s32[], bf16[4,128]{1,0:T(8,128)}) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %either = f32[8,128]{1,0:T(8,128)} conditional(%p, %z, %z), true_computation=%cheap, false_computation=%dear
  %warp = f32[8,128]{1,0:T(8,128)} fusion(%table, %index), kind=kCustom, calls=%fused_gather
  %tiny = f32[] add(%one, %two)
  %one = s32[] constant(1)
  %first = s32[] copy(%one)
  %start3 = (f32[8,128]{1,0:T(8,128)}, s32[]) tuple(%z, %first)
  %counted = (f32[8,128]{1,0:T(8,128)}, s32[]) while(%start3), condition=%under_four, body=%turn
  %endless = (f32[8,128]{1,0:T(8,128)}, s32[]) while(%start3), condition=%under_some, body=%turn
  %sum = f32[8,128]{1,0:T(8,128)} all-reduce(%warp), replica_groups={{0,1}}
  ROOT %out = bf16[4,128]{1,0:T(8,128)} bitcast(%conv)
}
"""


class Executable:
    def hlo_modules(self) -> list[Any]:
        return [SimpleNamespace(to_string=lambda: PROGRAM)]

    def get_compiled_memory_stats(self) -> Any:
        return SimpleNamespace(
            argument_size_in_bytes=1000,
            output_size_in_bytes=600,
            alias_size_in_bytes=500,
            temp_size_in_bytes=70,
            generated_code_size_in_bytes=8,
        )

    def cost_analysis(self) -> dict[str, float]:
        return {"flops": 4 * 128 * 128 * 2 * 3000.0}


@pytest.fixture(scope="module")
def found() -> tpu_estimate.Estimate:
    topology = tpu_compiler.Topology("v5e:2x2", tpu_compiler.CHIPS["v5e"], ())
    return tpu_estimate.estimate(Executable(), topology)


def test_raw_time_counts_loops_and_the_longer_branch(found: tpu_estimate.Estimate) -> None:
    """1.5 GHz: 10 us of the convolution, three times 1 ms in the first loop, 2 us of the branch, and
    2 us for each turn of the other loops: from 1 up to 4, and an unknown number that counts one."""
    assert found.raw == pytest.approx(10e-6 + 3 * 1e-3 + 2e-6 + 3 * 2e-6 + 2e-6)


def test_adjusted_time_believes_convolutions_and_bounds_the_rest(
    found: tpu_estimate.Estimate,
) -> None:
    """The loops' bodies move a few KiB, which takes no 2 us; nothing is faster than that."""
    uncosted = (8 * 128 * 4 * 3 + 4) / (0.9 * 819e9)
    assert found.adjusted == pytest.approx(10e-6 + (3 + 1 + 4) * 2e-6, abs=4 * uncosted)


def test_what_has_no_estimate_is_named_by_what_explains_it(found: tpu_estimate.Estimate) -> None:
    assert found.unestimated == {"gather": 1, "all-reduce": 1}


def test_memory_and_roofline(found: tpu_estimate.Estimate) -> None:
    assert found.hbm == 1000 + 600 - 500 + 70 + 8
    assert found.roofline == pytest.approx(2e-6)


def test_the_largest_come_first(found: tpu_estimate.Estimate) -> None:
    assert [(kind, origin) for _, kind, origin in found.largest[:2]] == [
        ("Loop", "slow/add"),
        ("Output", "layer/Conv2D"),
    ]


@pytest.mark.parametrize(
    ("types", "size"),
    [
        ("bf16[4,128]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
        ("f32[3,5]{1,0:T(8,128)}", 8 * 128 * 4),
        ("f32[3,5]{0,1:T(8,128)}", 8 * 128 * 4),
        ("f32[300,5]{0,1:T(8,128)}", 8 * 384 * 4),
        ("(u8[10]{0}, pred[4]{0})", 10 + 4),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),
        ("s64[]", 8),
    ],
)
def test_bytes_include_the_padding_to_tiles_but_not_what_is_on_the_chip(
    types: str, size: int
) -> None:
    assert tpu_estimate._hbm_bytes(types) == size


@pytest.mark.parametrize(
    ("table", "slices", "result", "moved"),
    [
        ("f32[5000]{0:T(1024)}", "1", "f32[300]{0:T(1024)}", 300 * 4096 + 4096),
        ("f32[5000]{0:T(1024)}", "1", "f32[300]{0:T(1024)S(1)}", 300 * 4096),
        ("f32[90,32,96]{2,1,0:T(8,128)}", "1,32,96", "f32[7,32,96]{2,1,0:T(8,128)S(1)}", 7 * 16384),
        ("f32[5000]{0:T(1024)S(1)}", "1", "f32[300]{0:T(1024)}", 300 * 4096 + 4096),
    ],
)
def test_a_look_up_moves_whole_tiles(table: str, slices: str, result: str, moved: int) -> None:
    program = tpu_estimate._Program(
        f"""ENTRY %main (t: f32[5000], i: s32[300]) -> f32[300] {{
  %t = {table} parameter(0)
  %i = s32[300]{{0:T(256)S(1)}} parameter(1)
  ROOT %g = {result} gather(%t, %i), offset_dims={{}}, slice_sizes={{{slices}}}
}}
"""
    )
    (each,) = program.schedule()
    assert program.moved_bytes(each) == moved


def test_what_is_scattered_is_read_and_written_where_it_goes() -> None:
    program = tpu_estimate._Program(
        """ENTRY %main (t: f32[5000], i: s32[7], v: f32[7]) -> f32[5000] {
  %t = f32[90,32,96]{2,1,0:T(8,128)} parameter(0)
  %i = s32[7]{0:T(256)S(1)} parameter(1)
  %v = f32[7,32,96]{2,1,0:T(8,128)} parameter(2)
  ROOT %s = f32[90,32,96]{2,1,0:T(8,128)} scatter(%t, %i, %v), to_apply=%add
}
"""
    )
    (each,) = program.schedule()
    assert program.moved_bytes(each) == 2 * 7 * 16384
