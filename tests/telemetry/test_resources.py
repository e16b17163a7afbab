"""Memory figures: plausible on the host, and the worst of the GPUs."""

import mmap
from types import SimpleNamespace

import pytest
import tensorflow as tf

from trainer.telemetry import resources


def test_host_memory_follows_an_allocation() -> None:
    before = resources.host_memory_gb()
    with mmap.mmap(-1, 2**28) as block:  # of its own: malloc might have free memory left to give
        block.write(b"\1" * 2**28)
        during, peak = resources.host_memory_gb(), resources.peak_host_memory_gb()
    assert during - before == pytest.approx(0.25, abs=0.05)
    assert during <= peak * 1.01 < 1000


def test_no_gpu_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [])
    assert resources.peak_gpu_memory_gb() is None


def test_the_worst_gpu_counts_and_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"GPU:0": 2**30, "GPU:1": 3 * 2**30}
    reset = []

    def info(name: str) -> dict[str, int]:
        if name not in peaks:
            raise ValueError("this allocator keeps no statistics")
        return {"current": 1, "peak": peaks[name]}

    devices = [SimpleNamespace(name=f"/device:GPU:{i}") for i in range(3)]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: devices)
    monkeypatch.setattr(tf.config.experimental, "get_memory_info", info)
    monkeypatch.setattr(tf.config.experimental, "reset_memory_stats", reset.append)
    assert resources.peak_gpu_memory_gb() == 3
    assert reset == ["GPU:0", "GPU:1"]
