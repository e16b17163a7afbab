"""The console: one line for each tick, and a progress bar that never mixes with it."""

from __future__ import annotations

import collections
import functools
import math
import sys
from collections.abc import Mapping

from tqdm import tqdm

from trainer.core.text import printable
from trainer.telemetry.statsfile import Stat


def format_time(seconds: float) -> str:
    """A duration as "42s", "3m 07s", "1h 02m 03s" or "2d 03h 04m"; "--" when it isn't known."""
    if not math.isfinite(seconds):
        return "--"
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}h {m:02d}m"
    if hours:
        return f"{h}h {m:02d}m {s:02d}s"
    return f"{m}m {s:02d}s" if minutes else f"{s}s"


class Eta:
    """Time left, from the pace of the last ticks of this process.

    The pace is wall time, with whatever maintenance fell between ticks. It is taken between ticks,
    so it is known from the second one on: the first holds the compilation.
    """

    _WINDOW = 10

    def __init__(self, total_kimg: float):
        self._total = total_kimg
        self._points: collections.deque[tuple[float, float]] = collections.deque(
            maxlen=self._WINDOW
        )

    def update(self, kimg: float, total_sec: float) -> float:
        """Seconds left after a tick; NaN when the pace is unknown.

        Args:
          kimg: position of the run.
          total_sec: wall time of the run.
        """
        self._points.append((kimg, total_sec))
        first_kimg, first_sec = self._points[0]
        if kimg >= self._total:
            return 0.0
        if kimg <= first_kimg:
            return math.nan
        return (self._total - kimg) * (total_sec - first_sec) / (kimg - first_kimg)


_TICK_FIELDS = (
    ("G loss", "Loss/G/loss"),
    ("D loss", "Loss/D/loss"),
    ("r1", "Loss/r1_penalty"),
    ("pl", "Loss/pl_penalty"),
)


def tick_line(stats: Mapping[str, Stat], eta_sec: float) -> str:
    """One line for one tick, in the order and the words of NVIDIA's.

    Args:
      stats: with the names `Telemetry.tick` adds; what is missing, or was not measured in this
        tick, shows as "--". Non-finite values show as nan and inf.
      eta_sec: seconds left.
    """
    mean = functools.partial(_mean, stats)
    total = stats["Timing/total_sec"].mean
    fields = [
        f"tick {mean('Progress/tick', '.0f'):<5s}",
        f"kimg {_plain(stats['Progress/kimg'].mean):<8s}",
        f"time {format_time(total):<12s}",
        f"sec/tick {mean('Timing/sec_per_tick', '.1f'):<7s}",
        f"sec/kimg {mean('Timing/sec_per_kimg', '.2f'):<7s}",
        f"maintenance {mean('Timing/maintenance_sec', '.1f'):<6s}",
        f"cpumem {mean('Resources/cpu_mem_gb', '.2f'):<6s}",
        f"gpumem {mean('Resources/peak_gpu_mem_gb', '.2f'):<6s}",
        f"augment {mean('Progress/augment', '.3f')}",
        f"D signs {mean('Loss/signs/real', '.2f')} (real)",
        *(f"{label} {mean(name, '.3g')}" for label, name in _TICK_FIELDS),
        f"ETA {format_time(eta_sec)}",
    ]
    return "  ".join(fields)


def short_tick_line(stats: Mapping[str, Stat], eta_sec: float) -> str:
    """What one looks at most of `tick_line`, in its words and in no more than 120 columns.

    Args:
      stats, eta_sec: as `tick_line` takes them.
    """
    mean = functools.partial(_mean, stats)
    fields = [
        f"kimg {_plain(stats['Progress/kimg'].mean):<9s}",
        f"sec/kimg {mean('Timing/sec_per_kimg', '.2f'):<7s}",
        f"augment {mean('Progress/augment', '.3f')}",
        f"D signs {mean('Loss/signs/real', '.2f'):<5s}",
        *(f"{label} {mean(name, '.3g'):<6s}" for label, name in _TICK_FIELDS[:2]),
        f"ETA {format_time(eta_sec)}",
    ]
    return "  ".join(fields)


def _mean(stats: Mapping[str, Stat], name: str, spec: str) -> str:
    stat = stats.get(name)
    return format(stat.mean, spec) if stat is not None and stat.num else "--"


def _plain(kimg: float) -> str:
    """Thousands of images with one to three decimals: ticks may be shorter than 0.1 kimg."""
    return f"{round(kimg, 3)}"


class Console:
    """Lines on stdout; on a terminal also a progress bar, on stderr, kept below the lines.

    Args:
      total_kimg: length of the run, for the ETA and the bar.
      resume_nimg: where this process goes on, in images.
      verbose: whole tick lines on a terminal, too, as in a file.
    """

    def __init__(self, total_kimg: float, resume_nimg: int, *, verbose: bool = False):
        self._eta = Eta(total_kimg)
        self._tick_line = tick_line if verbose or not sys.stdout.isatty() else short_tick_line
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=round(total_kimg * 1000),
                initial=resume_nimg,
                unit="img",
                unit_scale=True,
                dynamic_ncols=True,
                leave=False,
            )

    def tick(self, stats: Mapping[str, Stat]) -> None:
        """Prints the line of a tick; `stats` are those that `tick_line` takes."""
        kimg, total_sec = (stats[n].mean for n in ("Progress/kimg", "Timing/total_sec"))
        self.line(self._tick_line(stats, self._eta.update(kimg, total_sec)))

    def line(self, text: str) -> None:
        """Prints one line at once, so that a log file is never behind."""
        text = printable(text)
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, nimg: int) -> None:
        """Moves the bar to a position in images."""
        if self._bar is not None:
            self._bar.update(nimg - self._bar.n)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
