"""How long a run takes, as it is said before it starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from trainer import config as config_lib
from trainer.families.protocol import DataShape
from trainer.training import duration
from trainer.training.run import Run


def make(platform: str = "CPU", workers: int = 1, total_kimg: float = 25000) -> Run:
    sections: dict[str, Any] = {"training": {"batch_size": 16, "total_kimg": total_kimg}}
    made = Run.create(config_lib.from_dict(sections), DataShape((64, 64), 3, ()))
    placement = dataclasses.replace(made.placement, platform=platform, num_workers=workers)
    arithmetic = dataclasses.replace(made.arithmetic, num_replicas=4)
    return dataclasses.replace(made, placement=placement, arithmetic=arithmetic)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (42.3, "42 s"),
        (420, "7 min"),
        (10.42 * 3600, "10.4 h"),
        (3.2 * 86400, "3 days"),
        (680.4 * 86400, "680 days"),
        (12_000 * 86400, "12,000 days"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration.duration(seconds) == text


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cpu_counts_multiplications(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Each worker has a CPU of its own; what takes months is said to be too long."""
    made = make(workers=workers)
    monkeypatch.setattr(duration, "matrix_product_gflops", lambda: 100.0)
    line, note = duration.lines(made, None)
    days = 25e6 * made.cost().gflop_per_image / 100 / 86400 / workers
    assert line.startswith(
        f"time      25,000 kimg take about {days:,.0f} days to {4 * days:,.0f} days"
    )
    assert "since matrix products run at 100 GFLOP/s here" in line
    assert note.startswith("note      that is too long: take a smaller network")


def test_what_was_measured_counts() -> None:
    (line,) = duration.lines(make("GPU"), 1.5)
    assert line == "time      25,000 kimg take 10.4 h at 1.5 s/kimg, 42 GPU hours"
    (line,) = duration.lines(make(total_kimg=6), 14)
    assert line == "time      6 kimg take 84 s at 14 s/kimg"
    _, note = duration.lines(make("GPU"), 240)
    assert "too long" in note


def test_what_is_not_known_is_not_said() -> None:
    (line,) = duration.lines(make("TPU"), None)
    assert line.startswith("time      not known for TPUs: measure it with `python -m trainer probe")


def test_a_matrix_product_is_timed() -> None:
    assert 0.1 < duration.matrix_product_gflops(0.01) < 1e5
