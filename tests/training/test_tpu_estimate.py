"""What is read from the text of an optimised program."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.training import tpu_compiler, tpu_estimate

PROGRAM = """HloModule step, is_scheduled=true

%fused_conv (a: bf16[4,128], b: bf16[128,128]) -> bf16[4,128] {
  %a = bf16[4,128]{1,0:T(8,128)} parameter(0)
  %b = bf16[128,128]{1,0:T(8,128)} parameter(1)
  ROOT %dot = bf16[4,128]{1,0:T(8,128)} convolution(%a, %b), dim_labels=bf_io->bf
}

%fused_gather (t: f32[9,128], i: s32[8]) -> f32[8,128] {
  %t = f32[9,128]{1,0:T(8,128)} parameter(0)
  %i = s32[8]{0:T(128)} parameter(1)
  ROOT %g = f32[8,128]{1,0:T(8,128)} gather(%t, %i), offset_dims={1}
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

ENTRY %main (w: bf16[128,128], y: bf16[4,128]) -> bf16[4,128] {
  %w = bf16[128,128]{1,0:T(8,128)} parameter(0)
  %y = bf16[4,128]{1,0:T(8,128)} parameter(1)
  %conv = bf16[4,128]{1,0:T(8,128)} fusion(%y, %w), kind=kOutput, calls=%fused_conv, metadata={op_name="layer/Conv2D"}, backend_config={"estimated_cycles":"15000"}
  %loop = (s32[], bf16[4,128]{1,0:T(8,128)}) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %either = f32[8,128]{1,0:T(8,128)} conditional(%p, %z, %z), true_computation=%cheap, false_computation=%dear
  %warp = f32[8,128]{1,0:T(8,128)} fusion(%table, %index), kind=kCustom, calls=%fused_gather
  %tiny = f32[] add(%one, %two)
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
    """1.5 GHz: 10 us of the convolution, three times 1 ms in the loop, 2 us of the branch."""
    assert found.raw == pytest.approx(10e-6 + 3 * 1e-3 + 2e-6)


def test_adjusted_time_believes_convolutions_and_bounds_the_rest(
    found: tpu_estimate.Estimate,
) -> None:
    """The loop's body moves 2 KiB, which takes no 2 us; nothing is faster than that."""
    uncosted = (8 * 128 * 4 * 3 + 4) / (0.9 * 819e9)
    assert found.adjusted == pytest.approx(10e-6 + 3 * 2e-6 + 2e-6, abs=2 * uncosted)


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
