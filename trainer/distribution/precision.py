"""The number formats of `run.precision`.

Parameters, optimizer, losses and all that must not be rounded are in the full format; the
convolutions of the networks' highest resolutions (`model.num_fp16_res`) in the half one.
"""

from __future__ import annotations

import tensorflow as tf

from trainer.core.errors import ConfigError

_HALF = {"bfloat16": tf.bfloat16, "float16": tf.float16}

_REFUSED = {
    ("float16", "CPU"): "float16 is far slower than float32 on a CPU",
    ("float16", "TPU"): "TPUs compute in bfloat16, not in float16",
    ("float64", "TPU"): "TPUs have no float64",
}


def full_dtype(precision: str) -> tf.DType:
    """The format of variables, losses and whatever is not in a 16-bit block."""
    return tf.float64 if precision == "float64" else tf.float32


def half_dtype(precision: str) -> tf.DType | None:
    """The format of 16-bit blocks, or None for full precision throughout."""
    return _HALF.get(precision)


def prepare(precision: str, platform: str) -> None:
    """Refuses what the devices of a run can't do well, and makes products of float32 exact.

    By default GPUs round what they multiply to TensorFloat-32, of 10 bits, and TPUs to bfloat16, of
    7. A TPU needs six passes for an exact product: there a run in bfloat16 leaves it at one.

    Args:
      precision: as in the config.
      platform: "CPU", "GPU" or "TPU".

    Raises:
      ConfigError: naming what to use instead.
    """
    reason = _REFUSED.get((precision, platform))
    if reason is not None:
        raise ConfigError(
            f"run.precision = {precision!r}: {reason}; use float32 or bfloat16 on this {platform}"
        )
    rounded = platform == "TPU" and half_dtype(precision) is not None
    tf.config.experimental.enable_tensor_float_32_execution(rounded)
