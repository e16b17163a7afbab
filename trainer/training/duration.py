"""An estimate of the time that a run takes, before it starts."""

from __future__ import annotations

import time

import numpy as np

from trainer.data import processors
from trainer.training.run import Run

_DAY = 86400.0
_TOO_LONG = 60 * _DAY
_COUNT, _SIDE = 128, 64  # of matrices
# How many times as long as its multiplications in matrix products a step takes; small networks most.
_SLOWEST = 4


def lines(run: Run, sec_per_kimg: float | None) -> list[str]:
    """Says for the console how long the whole run takes, and warns if that is too long.

    Args:
      run: before its first step.
      sec_per_kimg: measured seconds for 1000 images; else, on a CPU, they follow from the counted
        multiplications and the measured speed of matrix products.
    """
    total, devices = run.config.training.total_kimg, run.separate_devices
    platform = run.placement.platform
    if sec_per_kimg is not None:
        seconds = sec_per_kimg * total
        taken = f"{total:,g} kimg take {duration(seconds)} at {sec_per_kimg:g} s/kimg"
        if devices > 1:
            taken += f", {seconds / 3600 * devices:,.0f} {platform} hours"
    elif run.placement.accelerated:
        return [
            f"time      not known for {platform}s: measure it with `python -m trainer probe step`, and "
            "give --sec_per_kimg"
        ]
    else:
        gflops = matrix_product_gflops()
        at_best = 1000 * run.cost().gflop_per_image / gflops / run.placement.num_workers
        seconds = at_best * total
        taken = (
            f"{total:,g} kimg take about {duration(seconds)} to {duration(_SLOWEST * seconds)}, by "
            f"estimate: {at_best:,.1f} to {_SLOWEST * at_best:,.1f} s/kimg, since matrix products run at "
            f"{gflops:.0f} GFLOP/s here"
        )
    if seconds <= _TOO_LONG:
        return [f"time      {taken}"]
    return [
        f"time      {taken}",
        "note      that is too long: take a smaller network (--config=list has some), fewer images "
        "(--set=training.total_kimg=...) or faster devices",
    ]


def duration(seconds: float) -> str:
    """Seconds as "42 s", "7 min", "10.4 h" or "680 days", as exact as an estimate is."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 3 * _DAY else f"{seconds / _DAY:,.0f} days"


def matrix_product_gflops(seconds: float = 0.1) -> float:
    """The fastest products of float32 matrices on the processors of this process, in 1e9 operations/s.

    Measured on one and multiplied: how long several wait for each other says more of what else the
    machine does. Products of this size are what BLAS computes on one.

    Args:
      seconds: for which it is repeated.
    """
    matrices = np.ones([_COUNT, _SIDE, _SIDE], np.float32)
    product, ends = np.empty_like(matrices), time.monotonic() + seconds
    times: list[float] = []
    while not times or time.monotonic() < ends:
        began = time.perf_counter()
        np.matmul(matrices, matrices, out=product)
        times.append(time.perf_counter() - began)
    return processors() * 2e-9 * _COUNT * _SIDE**3 / min(times)
