"""Advice a run gives about itself, at most once each, from signs in its statistics.

Karras et al. 2020 (arXiv:2006.06676): r_t = E[sign(D(real))] near 1 says that the discriminator has
learned the training images by heart (section 3); augmentations stay out of the generated images
while p is below about 0.8 (section 2.2).

What lost variety and a growing R1 penalty look like was measured on small images: see the figures
in README.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from trainer.telemetry.statsfile import Stat

_SIGNS = 0.95
_TICKS = 5
_KIMG = 50  # shorter runs of high signs are normal, above all at the start
_P_LIMIT = 0.8

_VARIETY = 0.5
_SNAPSHOTS = 3
_SNAPSHOTS_KIMG = 20  # a young run can be so poor for a while, and recover

_R1_START_KIMG = 5  # before, R1 grows in every run: an untrained discriminator is flat
_R1_WINDOW_KIMG = 50  # a slow growth over a whole run is normal
_R1_TICKS = 5  # averaged: a tick is a few batches of R1, and its neighbour can be half as much
_R1_GROWTH = 10.0
# The weight advised: so many times the present one, and at least so much. On 32x32 digits R1 stopped
# growing with 10 times the automatic 0.0128, but variety came back within 60 kimg only with 1.
_RAISE = 10
_LEAST_R1_GAMMA = 1.0


class Advice:
    """Watches the ticks of one process."""

    def __init__(self) -> None:
        self._since: list[float] = []  # kimg of the last ticks in a row with high signs and no p
        self._alike: list[float] = []  # kimg of the last snapshots in a row with little variety
        self._r1: list[tuple[float, float]] = []  # kimg and R1 penalty of the ticks of a window
        self._given: set[str] = set()

    def update(
        self, kimg: float, stats: Mapping[str, Stat], *, augment_p: float, r1_gamma: float
    ) -> list[str]:
        """Lines of advice after a tick; mostly none.

        Args:
          kimg: position of the run.
          stats: of the tick; `Loss/signs/real`, `Loss/r1_penalty` and `Progress/variety` are
            looked at where they are.
          augment_p: augmentation probability.
          r1_gamma: weight of the R1 penalty; 0 for none.
        """
        means = {name: stat.mean for name, stat in stats.items()}
        lines = {"leak": _leak(augment_p)}
        if (signs := means.get("Loss/signs/real")) is not None:
            lines["overfitting"] = self._overfitting(kimg, signs, augment_p)
        if (variety := means.get("Progress/variety")) is not None:
            lines["variety"] = self._lost_variety(kimg, variety, r1_gamma)
        if (penalty := means.get("Loss/r1_penalty")) is not None:
            lines["r1"] = self._growing_r1(kimg, penalty, r1_gamma)
        new = {kind: line for kind, line in lines.items() if line and kind not in self._given}
        self._given.update(new)
        return list(new.values())

    def _overfitting(self, kimg: float, signs_real: float, augment_p: float) -> str | None:
        overfits = signs_real > _SIGNS and augment_p == 0
        self._since = [*self._since, kimg] if overfits else []
        if len(self._since) < _TICKS or kimg - self._since[0] < _KIMG:
            return None
        return (
            f"advice: D tells nearly every real image (signs {signs_real:.2f}) without "
            "augmentation: it is learning them by heart; set augment.mode=ada"
        )

    def _lost_variety(self, kimg: float, variety: float, r1_gamma: float) -> str | None:
        self._alike = [*self._alike, kimg] if variety < _VARIETY else []
        if len(self._alike) < _SNAPSHOTS or kimg - self._alike[0] < _SNAPSHOTS_KIMG:
            return None
        return (
            f"advice: fakes have too little variety (their distance is {variety:.2f} of that of "
            f"reals) since kimg {self._alike[0]:.0f}: {_raise(r1_gamma)}"
        )

    def _growing_r1(self, kimg: float, penalty: float, r1_gamma: float) -> str | None:
        if kimg < _R1_START_KIMG:
            return None
        self._r1.append((kimg, penalty))
        while len(self._r1) > 2 * _R1_TICKS and self._r1[0][0] < kimg - _R1_WINDOW_KIMG:
            del self._r1[0]
        if len(self._r1) < 2 * _R1_TICKS:
            return None
        first, last = (
            statistics.fmean(value for _, value in ticks)
            for ticks in (self._r1[:_R1_TICKS], self._r1[-_R1_TICKS:])
        )
        if last < _R1_GROWTH * first:
            return None
        return (
            f"advice: the R1 penalty keeps growing, from {first:.2g} to {last:.2g} since kimg "
            f"{self._r1[0][0]:.0f}: D gets too steep for G to learn from; {_raise(r1_gamma)}"
        )


def _leak(augment_p: float) -> str | None:
    if augment_p <= _P_LIMIT:
        return None
    return (
        f"advice: augment p is {augment_p:.2f}; above {_P_LIMIT} augmentations may show in "
        "the images: the data set is small for this network, see how the samples do"
    )


def _raise(r1_gamma: float) -> str:
    """What to do against a discriminator that is too steep."""
    if r1_gamma == 0:
        return "start a new run with a larger weight of D's penalty"
    value = max(_RAISE * r1_gamma, _LEAST_R1_GAMMA)
    return f"start a new run with objective.r1_gamma={value:.2g}, in place of {r1_gamma:.2g}"
