"""Advice comes when it is due, once."""

from trainer.telemetry.advice import Advice


def test_overfitting_without_augmentation_is_told_once() -> None:
    advice = Advice()
    texts = [advice.update(kimg, 0.97, 0.0) for kimg in range(0, 200, 4)]
    told = [i for i, text in enumerate(texts) if text]
    assert told == [13]  # the first tick that is 50 kimg after the first
    assert "augment.mode=ada" in (texts[13] or "")


def test_a_moment_of_high_signs_is_not_overfitting() -> None:
    advice = Advice()
    assert not any(
        advice.update(kimg, 0.9 if kimg % 40 == 0 else 0.99, 0.0) for kimg in range(0, 400, 4)
    )
    assert not any(advice.update(kimg, 0.99, 0.1) for kimg in range(400, 800, 4))


def test_few_long_ticks_are_not_enough() -> None:
    advice = Advice()
    assert [bool(advice.update(kimg, 1.0, 0.0)) for kimg in (0, 40, 80, 120, 160)] == [
        False
    ] * 4 + [True]


def test_a_high_p_is_told_once() -> None:
    advice = Advice()
    texts = [advice.update(kimg, 0.6, p) for kimg, p in ((0, 0.8), (4, 0.81), (8, 0.9))]
    assert [bool(text) for text in texts] == [False, True, False]
