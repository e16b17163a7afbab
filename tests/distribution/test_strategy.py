"""Which devices a run takes."""

from __future__ import annotations

from typing import Any

import pytest
import tensorflow as tf

from trainer.core.errors import ConfigError
from trainer.distribution import strategy
from trainer.distribution.strategy import choose, half_dtype


@pytest.mark.parametrize("name", ["auto", "cpu", "one_device"])
def test_one_cpu(name: str) -> None:
    placement, jit = choose(name, "auto")
    assert placement.strategy.num_replicas_in_sync == 1
    assert (placement.description, placement.accelerated, jit) == ("one CPU", False, True)


def test_mirrored_takes_all_logical_cpus() -> None:
    cpus = tf.config.list_logical_devices("CPU")
    placement, _ = choose("mirrored", "off")
    assert placement.strategy.num_replicas_in_sync == len(cpus)
    assert placement.description == f"{len(cpus)} mirrored logical CPUs"
    assert not placement.accelerated


@pytest.mark.parametrize(("jit", "compiled"), [("auto", True), ("on", True), ("off", False)])
def test_jit(jit: str, compiled: bool) -> None:
    assert choose("cpu", jit)[1] == compiled


def test_a_name_that_is_none() -> None:
    with pytest.raises(ConfigError, match="'tpu' is not a strategy; choose one of auto, cpu"):
        choose("tpu", "auto")


class Machine:
    """A machine with GPUs, which can be hidden only before they are asked for."""

    def __init__(self, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names = [f"/gpu:{index}" for index in range(gpus)]
        self.started = False
        monkeypatch.setattr(tf.config, "list_logical_devices", self._list)
        monkeypatch.setattr(tf.config, "set_visible_devices", self._set)
        for kind in ("MirroredStrategy", "OneDeviceStrategy"):
            monkeypatch.setattr(tf.distribute, kind, lambda names, kind=kind: (kind, names))

    def _list(self, kind: str) -> list[Any]:
        self.started = True
        names = self.names if kind == "GPU" else ["/cpu:0"]
        return [type("Device", (), {"name": name}) for name in names]

    def _set(self, devices: list[Any], kind: str) -> None:
        assert kind == "GPU"
        if self.started:
            raise RuntimeError("Visible devices cannot be modified after being initialized")
        self.names = devices


@pytest.mark.parametrize(
    ("gpus", "name", "wanted", "description"),
    [
        (1, "auto", ("OneDeviceStrategy", "/gpu:0"), "one GPU"),
        (2, "auto", ("MirroredStrategy", ["/gpu:0", "/gpu:1"]), "2 mirrored GPUs"),
        (2, "one_device", ("OneDeviceStrategy", "/gpu:0"), "one GPU"),
        (1, "mirrored", ("MirroredStrategy", ["/gpu:0"]), "1 mirrored GPUs"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, name: str, wanted: object, description: str
) -> None:
    Machine(gpus, monkeypatch)
    placement, _ = choose(name, "auto")
    assert (placement.strategy, placement.description) == (wanted, description)
    assert placement.accelerated


def test_cpu_hides_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(2, monkeypatch)
    placement, _ = choose("cpu", "auto")
    assert machine.names == []
    assert (placement.description, placement.accelerated) == ("one CPU", False)


def test_formats_of_16_bit_blocks() -> None:
    assert [half_dtype(n) for n in ("float32", "bfloat16", "float16")] == [
        None,
        tf.bfloat16,
        tf.float16,
    ]
    assert set(strategy.STRATEGIES) == {"auto", "cpu", "one_device", "mirrored"}
