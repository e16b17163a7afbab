"""Names of targets, and what they stand for."""

from __future__ import annotations

import pytest

from tests.vertex import discovery
from trainer.core.errors import UsageError
from trainer.vertex import targets


@pytest.mark.parametrize(
    ("name", "machines", "machine_type", "devices", "strategy"),
    [
        ("a100x1", 1, "a2-highgpu-1g", 1, "one_device"),
        ("a100x8", 1, "a2-highgpu-8g", 8, "mirrored"),
        ("a100x16", 1, "a2-megagpu-16g", 16, "mirrored"),
        ("a100x16=2x8", 2, "a2-highgpu-8g", 16, "multi_worker"),
        ("a100-80x4", 1, "a2-ultragpu-4g", 4, "mirrored"),
        ("h100x1", 1, "a3-highgpu-1g", 1, "one_device"),
        ("h100x8", 1, "a3-highgpu-8g", 8, "mirrored"),
        ("h100-megax8", 1, "a3-megagpu-8g", 8, "mirrored"),
        ("h200x8", 1, "a3-ultragpu-8g", 8, "mirrored"),
        ("h200x16=2x8", 2, "a3-ultragpu-8g", 16, "multi_worker"),
        ("b200x8", 1, "a4-highgpu-8g", 8, "mirrored"),
        ("rtx6000x1", 1, "g4-standard-48", 1, "one_device"),
        ("rtx6000x8", 1, "g4-standard-384", 8, "mirrored"),
        ("l4x1", 1, "g2-standard-16", 1, "one_device"),
        ("t4x1", 1, "n1-standard-8", 1, "one_device"),
        ("v100x8", 1, "n1-standard-64", 8, "mirrored"),
        ("v5e-1", 1, "ct5lp-hightpu-1t", 1, "tpu"),
        ("v5e-4", 1, "ct5lp-hightpu-4t", 4, "tpu"),
        ("v5e-8", 1, "ct5lp-hightpu-8t", 8, "tpu"),
        ("v5e-16", 1, "ct5lp-hightpu-4t", 16, "tpu"),
        ("v2-8", 1, "cloud-tpu", 8, "tpu"),
        ("v3-32", 1, "cloud-tpu", 32, "tpu"),
        ("cpux1", 1, "n1-standard-16", 1, "cpu"),
        ("cpux2=2x1", 2, "n1-standard-16", 2, "multi_worker"),
    ],
)
def test_a_target(name: str, machines: int, machine_type: str, devices: int, strategy: str) -> None:
    found = targets.parse(name)
    assert (found.machines, found.machine_type, found.devices) == (machines, machine_type, devices)
    assert found.strategy == strategy


def test_every_name_is_a_target() -> None:
    assert len(set(targets.names())) == len(targets.names()) > 30
    for name in targets.names():
        assert targets.parse(name).name == name


def test_accelerators_are_those_that_the_api_knows() -> None:
    schema = discovery.document()["schemas"]["GoogleCloudAiplatformV1MachineSpec"]
    known = set(schema["properties"]["acceleratorType"]["enum"])
    assert {targets.parse(name).accelerator for name in targets.names()} - {""} <= known


def test_a_slice_has_the_chips_of_its_topology() -> None:
    for size, topology in targets.TPUS["v5e"].topologies.items():
        height, width = map(int, topology.split("x"))
        assert height * width == size


def test_pods() -> None:
    assert [n for n in ("v5e-8", "v3-8", "v5e-16", "v3-32") if targets.parse(n).is_pod] == [
        "v5e-16",
        "v3-32",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a100", "did you mean a100x"),
        ("A100x8", "did you mean a100x8?"),
        ("a100x3", "no machine has 3 of a100, there is 1, 2, 4, 8, 16; take a100x3=3x1"),
        ("a100x32", "take a100x32=2x16 or a100x32=4x8"),
        ("a100x16=2x4", "2 machines of 4 are not 16"),
        ("a100x0", "0 are not 0"),
        ("t4x8", "take t4x8=2x4 or t4x8=4x2"),
        ("v5e-2", "there is v5e-1, v5e-4, v5e-8"),
        ("v6e-8", "v2, v3 and v5e only"),
        ("v4-8", "no TPU v4"),
        ("tpu", "give one as"),
    ],
)
def test_no_target(name: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        targets.parse(name)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
