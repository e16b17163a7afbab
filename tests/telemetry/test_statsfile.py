"""stats.jsonl stays whole, valid and without duplicates."""

import json
import math
import time
from pathlib import Path

import pytest

from trainer.core import storage
from trainer.telemetry import statsfile
from trainer.telemetry.statsfile import Stat


def _fail_on_constant(text: str) -> float:
    raise AssertionError(f"{text} is not JSON")


def _read(path: Path) -> list[dict]:
    lines = path.read_text().split("\n")
    assert lines.pop() == ""
    return [json.loads(line, parse_constant=_fail_on_constant) for line in lines]


def _write(path: Path, positions: list[int]) -> None:
    for i, nimg in enumerate(positions):
        statsfile.append(str(path), {"a": Stat(1, 2.0, 0.5)}, tick=i, nimg=nimg)


def test_lines_have_nvidias_form(tmp_path: Path) -> None:
    path = tmp_path / "run" / "stats.jsonl"
    statsfile.append(str(path), {"Loss/G/loss": Stat(64, 0.75, 0.25)}, tick=3, nimg=12000)
    statsfile.append(str(path), {}, tick=4, nimg=16000)
    first, second = _read(path)
    assert first.pop("timestamp") == pytest.approx(time.time(), abs=60)
    stat = {"num": 64, "mean": 0.75, "std": 0.25}
    assert first == {"Loss/G/loss": stat, "tick": 3, "nimg": 12000}
    assert (second["tick"], second["nimg"]) == (4, 16000)


def test_non_finite_values_are_null(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    stats = {
        "a": Stat(1, math.nan, 1.0),
        "b": Stat(2, 1.0, math.inf),
        "c": Stat(0, math.nan, math.nan),
    }
    statsfile.append(str(path), stats, tick=0, nimg=1)
    (line,) = _read(path)
    assert line["a"] == {"num": 1, "mean": None, "std": 1.0}
    assert line["b"] == {"num": 2, "mean": 1.0, "std": None}
    assert line["c"] == {"num": 0, "mean": None, "std": None}


def test_values_may_be_numpy_scalars(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "stats.jsonl"
    stat = Stat(np.int64(4), np.float32(0.5), np.float32(0.25))
    statsfile.append(str(path), {"a": stat}, tick=0, nimg=1)
    assert _read(path)[0]["a"] == {"num": 4, "mean": 0.5, "std": 0.25}


def test_truncate_keeps_up_to_and_including_the_position(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    _write(path, [1000, 2000, 3000, 4000])
    before = path.read_bytes().splitlines(keepends=True)
    assert statsfile.truncate_after(str(path), 3000) == 1
    assert path.read_bytes() == b"".join(before[:3])
    assert statsfile.truncate_after(str(path), 3500) == 0
    assert path.read_bytes() == b"".join(before[:3])


@pytest.mark.parametrize(
    "torn", [b'{"a": {"num": 1, "me', b'{"nimg": 10', b"\0\0\0", b"\xc3", b"7", b"{}"]
)
def test_truncate_drops_a_torn_line(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "stats.jsonl"
    _write(path, [1000, 2000])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert statsfile.truncate_after(str(path), 10**9) == 1
    assert path.read_bytes() == whole


def test_truncate_repairs_a_last_line_that_lost_only_its_end(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    _write(path, [1000, 2000])
    path.write_bytes(path.read_bytes()[:-1])
    statsfile.truncate_after(str(path), 10**9)
    _write(path, [3000])
    assert [line["nimg"] for line in _read(path)] == [1000, 2000, 3000]


def test_truncate_of_a_new_run_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    assert statsfile.truncate_after(str(path), 0) == 0
    assert not path.exists()
    _write(path, [0, 1000])
    assert statsfile.truncate_after(str(path), 0) == 2
    assert path.read_bytes() == b""


def test_works_on_a_url() -> None:
    url = "memory://bucket/stats/stats.jsonl"
    for i in range(3):
        statsfile.append(url, {}, tick=i, nimg=1000 * (i + 1))
    statsfile.truncate_after(url, 2000)
    assert [json.loads(line)["tick"] for line in storage.read_text(url).splitlines()] == [0, 1]
