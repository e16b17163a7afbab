"""Number formats, and where which is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tensorflow as tf

from trainer.core.errors import ConfigError
from trainer.distribution.precision import full_dtype, half_dtype, prepare


@pytest.fixture(autouse=True)
def _same_products_after() -> Iterator[None]:
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    yield
    tf.config.experimental.enable_tensor_float_32_execution(before)


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
        prepare(precision, platform)
    assert error.value.exit_code == 2
    assert "use float32 or bfloat16" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_else_is_allowed() -> None:
    for precision in ("float32", "bfloat16"):
        for platform in ("CPU", "GPU", "TPU"):
            prepare(precision, platform)
    prepare("float64", "CPU")
    prepare("float16", "GPU")


@pytest.mark.parametrize(
    ("precision", "platform", "exact"),
    [
        ("float32", "GPU", True),
        ("bfloat16", "GPU", True),
        ("float32", "TPU", True),
        ("bfloat16", "TPU", False),
    ],
)
def test_products_of_float32_are_rounded_in_bfloat16_on_tpus_only(
    precision: str, platform: str, exact: bool
) -> None:
    """What the compiler is told: nothing, which lets GPUs and TPUs round, or not to."""
    prepare(precision, platform)
    square = tf.TensorSpec([4, 4])

    @tf.function(jit_compile=True, autograph=False)
    def products(a: tf.Tensor, b: tf.Tensor) -> list[tf.Tensor]:
        kernel = tf.reshape(b, [1, 1, 4, 4])
        found = tf.nn.conv2d(tf.reshape(a, [1, 2, 2, 4]), kernel, 1, "SAME")
        return [tf.matmul(a, b), found, tf.einsum("ij,kj->ik", a, b)]

    text = products.experimental_get_compiler_ir(square, square)(stage="hlo")
    assert text.count("operand_precision={highest,highest}") == (3 if exact else 0)
