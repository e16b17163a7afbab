"""Number formats, and where which is refused."""

from __future__ import annotations

import pytest
import tensorflow as tf

from trainer.core.errors import ConfigError
from trainer.distribution.precision import check, full_dtype, half_dtype


@pytest.mark.parametrize(
    ("precision", "full", "half"),
    [
        ("float32", tf.float32, None),
        ("float64", tf.float64, None),
        ("bfloat16", tf.float32, tf.bfloat16),
        ("float16", tf.float32, tf.float16),
    ],
)
def test_formats(precision: str, full: tf.DType, half: tf.DType | None) -> None:
    assert full_dtype(precision) == full
    assert half_dtype(precision) == half


@pytest.mark.parametrize(
    ("precision", "platform"), [("float16", "CPU"), ("float16", "TPU"), ("float64", "TPU")]
)
def test_what_devices_cannot_do_well_is_refused(precision: str, platform: str) -> None:
    with pytest.raises(ConfigError, match=f"run.precision = '{precision}'.*{platform}") as error:
        check(precision, platform)
    assert error.value.exit_code == 2
    assert "use float32 or bfloat16" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_else_is_allowed() -> None:
    for precision in ("float32", "bfloat16"):
        for platform in ("CPU", "GPU", "TPU"):
            check(precision, platform)
    check("float64", "CPU")
    check("float16", "GPU")
