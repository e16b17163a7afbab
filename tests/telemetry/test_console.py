"""The console: durations, the ETA, the tick line, and the bar that keeps out of its way."""

import math
import re
import sys

import pytest

from trainer.telemetry.console import Console, Eta, format_time, short_tick_line, tick_line
from trainer.telemetry.statsfile import Stat, constant


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (187, "3m 07s"),
        (3599.7, "1h 00m 00s"),
        (3723, "1h 02m 03s"),
        (86399, "23h 59m 59s"),
        (86400 * 2 + 3 * 3600 + 4 * 60 + 59, "2d 03h 04m"),
        (math.nan, "--"),
        (math.inf, "--"),
    ],
)
def test_format_time(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_eta_is_known_from_the_second_tick_on_without_the_compilation() -> None:
    eta = Eta(total_kimg=100)
    assert math.isnan(eta.update(4, 400))
    assert eta.update(8, 440) == pytest.approx(92 * 10)  # with the maintenance


def test_eta_of_a_resumed_run_is_that_of_this_machine() -> None:
    """The time before counts in the run's, and not in the pace."""
    eta = Eta(total_kimg=100)
    assert math.isnan(eta.update(54, 50_400))
    assert eta.update(58, 50_408) == pytest.approx(42 * 2)


def test_eta_follows_the_last_ten_ticks() -> None:
    eta = Eta(total_kimg=1000)
    for i in range(100):
        eta.update(i, i * 50.0)
    for i in range(100, 110):
        left = eta.update(i, 5000 + (i - 100) * 2.0)
    assert left == pytest.approx((1000 - 109) * 2)


def test_eta_at_and_after_the_end_and_when_unknown() -> None:
    eta = Eta(total_kimg=10)
    assert math.isnan(eta.update(2, 5))
    assert math.isnan(eta.update(2, 5))
    assert eta.update(10, 25) == 0
    assert eta.update(12, 29) == 0
    assert Eta(total_kimg=10).update(10, 25) == 0


def _stats() -> dict[str, Stat]:
    values = {
        "Progress/tick": 12,
        "Progress/kimg": 48.0,
        "Progress/augment": 0.0123,
        "Timing/total_sec": 3723,
        "Timing/sec_per_tick": 123.4,
        "Timing/sec_per_kimg": 30.851,
        "Timing/maintenance_sec": 0.12,
        "Resources/cpu_mem_gb": 2.13,
        "Loss/signs/real": 0.31,
        "Loss/G/loss": 0.9,
        "Loss/D/loss": 1.25,
        "Loss/r1_penalty": 0.0123,
        "Loss/pl_penalty": 1.5,
    }
    return {name: constant(value) for name, value in values.items()}


def test_tick_line() -> None:
    line = tick_line(_stats(), eta_sec=11520)
    assert re.sub(" +", " ", line) == (
        "tick 12 kimg 48.0 time 1h 02m 03s sec/tick 123.4 sec/kimg 30.85 maintenance 0.1 "
        "cpumem 2.13 gpumem -- augment 0.012 D signs 0.31 (real) G loss 0.9 D loss 1.25 "
        "r1 0.0123 pl 1.5 ETA 3h 12m 00s"
    )
    assert "\n" not in line


def test_tick_lines_stay_in_columns() -> None:
    later = {**_stats(), "Progress/kimg": constant(25000.0), "Progress/tick": constant(6250)}
    later["Timing/total_sec"] = constant(9 * 86400)
    first, second = tick_line(_stats(), 10), tick_line(later, 10)
    for word in ("kimg", "time", "sec/tick", "augment"):
        assert first.index(word) == second.index(word)


def test_tick_line_shows_what_is_missing_and_what_is_not_finite() -> None:
    stats = _stats()
    del stats["Loss/pl_penalty"]
    stats["Loss/r1_penalty"] = Stat(0, math.nan, math.nan)  # not measured is not NaN
    stats["Loss/G/loss"] = constant(math.nan)
    stats["Loss/D/loss"] = constant(math.inf)
    stats["Resources/peak_gpu_mem_gb"] = constant(7.5)
    line = tick_line(stats, math.nan)
    assert "G loss nan  D loss inf  r1 --  pl --  ETA --" in line
    assert "gpumem 7.50" in line


def test_tick_line_of_very_short_ticks_still_tells_them_apart() -> None:
    stats = {**_stats(), "Progress/kimg": constant(0.064)}
    assert "kimg 0.064 " in tick_line(stats, 1)


def test_short_tick_line() -> None:
    line = short_tick_line(_stats(), eta_sec=11520)
    assert re.sub(" +", " ", line) == (
        "kimg 48.0 sec/kimg 30.85 augment 0.012 D signs 0.31 G loss 0.9 D loss 1.25 ETA 3h 12m 00s"
    )


def test_a_short_tick_line_fits_whatever_it_shows() -> None:
    extremes = {
        "Progress/kimg": 199999.936,
        "Timing/sec_per_kimg": 9999.99,
        "Loss/signs/real": -0.31,
        "Loss/G/loss": -1.23e-5,
        "Loss/D/loss": -1.23e-5,
    }
    stats = _stats() | {name: constant(value) for name, value in extremes.items()}
    assert len(short_tick_line(stats, eta_sec=680 * 86400.0)) <= 120


@pytest.mark.parametrize(
    ("terminal", "verbose", "whole"),
    [(False, False, True), (False, True, True), (True, False, False), (True, True, True)],
)
def test_ticks_are_short_on_a_terminal(
    capsys, monkeypatch, terminal: bool, verbose: bool, whole: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    console = Console(total_kimg=96, resume_nimg=0, verbose=verbose)
    for kimg, seconds in ((48.0, 3723), (52.0, 3743)):
        times = {"Progress/kimg": constant(kimg), "Timing/total_sec": constant(seconds)}
        console.tick(_stats() | times)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("tick 12" if whole else "kimg 48.0")
    assert ("maintenance" in first) == whole
    assert first.endswith("ETA --")
    assert second.endswith("ETA 3m 40s")  # 44 kimg at 5 s


def test_console_without_a_terminal_prints_lines_only(capsys) -> None:
    console = Console(total_kimg=1, resume_nimg=0)
    console.line("one")
    console.progress(500)
    console.close()
    assert capsys.readouterr() == ("one\n", "")


def test_console_on_a_terminal_keeps_lines_on_stdout(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    console = Console(total_kimg=1, resume_nimg=250)
    console.progress(500)
    assert console._bar is not None
    assert (console._bar.n, console._bar.total, console._bar.initial) == (500, 1000, 250)
    console.line("one")
    console.close()
    out, err = capsys.readouterr()
    assert out == "one\n"
    assert "img" in err


def test_lines_steer_no_terminal(capsys) -> None:
    Console(1.0, 0).line("wrote a\x1b[2J\nb\u202e.png")
    assert capsys.readouterr().out == "wrote a\\x1b[2J\\nb\\u202e.png\n"
