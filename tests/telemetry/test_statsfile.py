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
        with path.open("ab") as file:
            file.write(statsfile.line({"a": Stat(1, 2.0, 0.5)}, tick=i, nimg=nimg))


def _append(path: Path, stats: dict[str, Stat], *, tick: int, nimg: int) -> None:
    statsfile.open_after(str(path), 10**9).add(statsfile.line(stats, tick=tick, nimg=nimg))


def test_lines_have_nvidias_form(tmp_path: Path) -> None:
    path = tmp_path / "run" / "stats.jsonl"
    _append(path, {"Loss/G/loss": Stat(64, 0.75, 0.25)}, tick=3, nimg=12000)
    _append(path, {}, tick=4, nimg=16000)
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
    _append(path, stats, tick=0, nimg=1)
    (line,) = _read(path)
    assert line["a"] == {"num": 1, "mean": None, "std": 1.0}
    assert line["b"] == {"num": 2, "mean": 1.0, "std": None}
    assert line["c"] == {"num": 0, "mean": None, "std": None}


def test_values_may_be_numpy_scalars(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "stats.jsonl"
    stat = Stat(np.int64(4), np.float32(0.5), np.float32(0.25))
    _append(path, {"a": stat}, tick=0, nimg=1)
    assert _read(path)[0]["a"] == {"num": 4, "mean": 0.5, "std": 0.25}


def test_what_follows_the_position_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    _write(path, [1000, 2000, 3000, 4000])
    before = path.read_bytes().splitlines(keepends=True)
    statsfile.open_after(str(path), 3000)
    assert path.read_bytes() == b"".join(before[:3])
    statsfile.open_after(str(path), 3500)
    assert path.read_bytes() == b"".join(before[:3])


@pytest.mark.parametrize("torn", [b'{"a": {"num": 1, "me', b'{"nimg": 10', b"\0\0\0", b"{"])
def test_a_torn_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "stats.jsonl"
    _write(path, [1000, 2000])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    statsfile.open_after(str(path), 10**9)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("nimg", [0, 1000, 10**9])
def test_lines_that_no_run_has_written_stay(tmp_path: Path, nimg: int) -> None:
    path = tmp_path / "stats.jsonl"
    others = [b"# my notes", b"", b"7", b"{}", b'{"nimg": 9e9}', b"\xff", b"[" * 100_000]
    path.write_bytes(b"".join(line + b"\n" for line in others))
    before = path.read_bytes()
    _write(path, [10**9 + 1])
    path.write_bytes(path.read_bytes() + b"no end")
    statsfile.open_after(str(path), nimg)
    assert path.read_bytes() == before + b"no end\n"


def test_a_last_line_that_lost_only_its_end_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    _write(path, [1000, 2000])
    path.write_bytes(path.read_bytes()[:-1])
    statsfile.open_after(str(path), 10**9)
    _write(path, [3000])
    assert [line["nimg"] for line in _read(path)] == [1000, 2000, 3000]


def test_a_new_run_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    statsfile.open_after(str(path), 0)
    assert path.read_bytes() == b""
    _write(path, [8, 1000])
    statsfile.open_after(str(path), 0)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("where", ["memory", "gs"])
def test_works_on_a_url(where: str, request: pytest.FixtureRequest) -> None:
    root = "memory://bucket" if where == "memory" else request.getfixturevalue("gcs").url
    url = f"{root}/stats/stats.jsonl"
    file = statsfile.open_after(url, 0)
    for i in range(3):
        file.add(statsfile.line({}, tick=i, nimg=1000 * (i + 1)))
    file.flush()
    statsfile.open_after(url, 2000)
    assert [json.loads(line)["tick"] for line in storage.read_text(url).splitlines()] == [0, 1]
