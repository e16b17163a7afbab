"""Advice a run gives about itself, at most once each, from what NVIDIA's papers say of the signs.

Karras et al. 2020 (arXiv:2006.06676): r_t = E[sign(D(real))] near 1 says that the discriminator has
learned the training images by heart (section 3); augmentations stay out of the generated images
while p is below about 0.8 (section 2.2).
"""

from __future__ import annotations

_SIGNS = 0.95
_TICKS = 5
_KIMG = 50  # shorter runs of high signs are normal, above all at the start
_P_LIMIT = 0.8


class Advice:
    """Watches the ticks of one process."""

    def __init__(self) -> None:
        self._since: list[float] = []  # kimg of the last ticks in a row with high signs and no p
        self._given: set[str] = set()

    def update(self, kimg: float, signs_real: float, augment_p: float) -> str | None:
        """One line of advice, or None.

        Args:
          kimg: position of the run.
          signs_real: mean of the discriminator's signs on real images, -1 to 1.
          augment_p: augmentation probability.
        """
        overfits = signs_real > _SIGNS and augment_p == 0
        self._since = [*self._since, kimg] if overfits else []
        if len(self._since) >= _TICKS and kimg - self._since[0] >= _KIMG:
            return self._once(
                "overfitting",
                f"advice: D tells nearly every real image (signs {signs_real:.2f}) without "
                "augmentation: it is learning them by heart; set augment.mode=ada",
            )
        if augment_p > _P_LIMIT:
            return self._once(
                "leak",
                f"advice: augment p is {augment_p:.2f}; above {_P_LIMIT} augmentations may show in "
                "the images: the data set is small for this network, see how the samples do",
            )
        return None

    def _once(self, kind: str, text: str) -> str | None:
        if kind in self._given:
            return None
        self._given.add(kind)
        return text
