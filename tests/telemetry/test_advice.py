"""Advice comes when it is due, once."""

from __future__ import annotations

from trainer.telemetry.advice import Advice
from trainer.telemetry.statsfile import Stat, constant


def update(
    advice: Advice, kimg: float, *, p: float = 0.2, r1_gamma: float = 0.0128, **means: float
) -> list[str]:
    """Advice after a tick with these statistics, healthy unless they are given."""
    names = {"signs": "Loss/signs/real", "r1": "Loss/r1_penalty", "variety": "Progress/variety"}
    stats: dict[str, Stat] = {names[name]: constant(mean) for name, mean in means.items()}
    return advice.update(kimg, stats, augment_p=p, r1_gamma=r1_gamma)


def test_overfitting_without_augmentation_is_told_once() -> None:
    advice = Advice()
    texts = [update(advice, kimg, signs=0.97, p=0) for kimg in range(0, 200, 4)]
    told = [i for i, text in enumerate(texts) if text]
    assert told == [13]  # the first tick that is 50 kimg after the first
    (text,) = texts[13]
    assert "augment.mode=ada" in text


def test_a_moment_of_high_signs_is_not_overfitting() -> None:
    advice = Advice()
    assert not any(
        update(advice, kimg, signs=0.9 if kimg % 40 == 0 else 0.99, p=0)
        for kimg in range(0, 400, 4)
    )
    assert not any(update(advice, kimg, signs=0.99, p=0.1) for kimg in range(400, 800, 4))


def test_few_long_ticks_are_not_enough() -> None:
    advice = Advice()
    assert [bool(update(advice, kimg, signs=1, p=0)) for kimg in (0, 40, 80, 120, 160)] == [
        False
    ] * 4 + [True]


def test_a_high_p_is_told_once() -> None:
    advice = Advice()
    texts = [update(advice, kimg, signs=0.6, p=p) for kimg, p in ((0, 0.8), (4, 0.81), (8, 0.9))]
    assert [len(text) for text in texts] == [0, 1, 0]


def test_lost_variety_is_told_once_with_a_value() -> None:
    """Digits of which each class became one glyph: its snapshots from kimg 8 on."""
    advice = Advice()
    varieties = [0.60, 0.56, 0.54, 0.52, 0.51, 0.49, *[0.45] * 30]
    texts = [update(advice, 8 + i, variety=variety) for i, variety in enumerate(varieties)]
    told = [8 + i for i, text in enumerate(texts) if text]
    assert told == [33]  # the first snapshot that is 20 kimg after the first low one
    (text,) = texts[25]
    assert "variety" in text and "0.45" in text and "kimg 13" in text
    assert "objective.r1_gamma=1, in place of 0.013" in text


def test_three_snapshots_far_apart_are_enough() -> None:
    advice = Advice()
    texts = [update(advice, kimg, variety=0.1, r1_gamma=1) for kimg in (200, 400, 600)]
    assert [len(text) for text in texts] == [0, 0, 1]
    assert "objective.r1_gamma=10" in texts[2][0]


def test_without_r1_no_weight_of_it_is_named() -> None:
    """Of WGAN-GP, say."""
    advice = Advice()
    *_, (text,) = [update(advice, kimg, variety=0.1, r1_gamma=0) for kimg in (200, 400, 600)]
    assert "r1_gamma" not in text and "D's penalty" in text


def test_variety_that_comes_back_is_not_lost() -> None:
    advice = Advice()
    for kimg in range(0, 400, 4):
        assert not update(advice, kimg, variety=0.6 if kimg % 12 == 0 else 0.2)
        assert not update(advice, kimg + 1)  # a tick without a snapshot says nothing about it


def test_healthy_variety_is_silent() -> None:
    """Digits that recover by themselves, by the kimg; and emoji, from kimg 5 to 65."""
    advice = Advice()
    varieties = [0.51, *[0.49] * 12, 0.51, 0.52, 0.53, 0.55, 0.57, 0.6, 0.64]
    assert not any(update(advice, 21 + i, variety=v, r1_gamma=1) for i, v in enumerate(varieties))
    advice = Advice()
    varieties = [0.79, 0.76, 0.78, 0.84, 0.86, 0.87, 0.90, 0.91, 0.92, 0.93, 0.96, 0.94, 0.95]
    assert not any(update(advice, 5 + 5 * i, variety=v) for i, v in enumerate(varieties))


def test_a_growing_r1_is_told_once_with_a_value() -> None:
    """The R1 penalty of the same digits, a tick for each kimg."""
    advice = Advice()
    start = [0.007, 0.09, 0.26, 0.38, 0.31, 0.34, 0.22, 0.37, 0.47, 0.58, 0.87, 1.4, 2.5, 2.5, 2.2]
    later = [3.0, 5.7, 6.3, 5.8, 6.7, 9.1, 6.0, 10.0, 4.9, 6.1, 9.2, 10.0, 9.5, 11.0, 9.6, 12.0]
    texts = [update(advice, kimg, r1=r1) for kimg, r1 in enumerate([*start, *later])]
    assert [kimg for kimg, text in enumerate(texts) if text] == [18]
    (text,) = texts[18]
    assert "from 0.4 to 4.6 since kimg 5" in text
    assert "objective.r1_gamma=1, in place of 0.013" in text


def test_r1_that_is_flat_or_grows_slowly_is_silent() -> None:
    """Emoji: a small R3GAN, whose weights fall to a tenth in these 100 kimg."""
    advice = Advice()
    every_4 = [0.005, 0.054, 0.077, 0.094, 0.083, 0.078, 0.075, 0.068, 0.073, 0.082, 0.094, 0.093]
    every_4 += [0.094, 0.1, 0.11, 0.13, 0.13, 0.15, 0.17, 0.19, 0.21, 0.2, 0.26, 0.31, 0.31]
    assert not any(update(advice, 4 * i, r1=r1) for i, r1 in enumerate(every_4))
    advice = Advice()
    assert not any(update(advice, kimg, r1=1 + kimg / 100) for kimg in range(0, 20_000, 4))
    advice = Advice()
    assert not any(update(advice, kimg, r1=0.1 if kimg % 9 else 2) for kimg in range(0, 400, 4))


def test_r1_of_the_start_does_not_count() -> None:
    """An untrained discriminator is flat."""
    advice = Advice()
    assert not any(update(advice, kimg, r1=0.001 if kimg < 5 else 0.1) for kimg in range(100))
