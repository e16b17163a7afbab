"""Which devices take part in a run, and how numbers are computed on them."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf

from trainer.core.errors import ConfigError

STRATEGIES = ("auto", "cpu", "one_device", "mirrored")


@dataclass(frozen=True)
class Placement:
    """Where a run runs.

    Attributes:
      strategy: TensorFlow's strategy.
      description: what was chosen, for the console.
      accelerated: whether it runs on GPUs.
    """

    strategy: tf.distribute.Strategy
    description: str
    accelerated: bool


def choose(name: str, jit: str) -> tuple[Placement, bool]:
    """The devices of a run, and whether its step is compiled.

    Args:
      name: "cpu", "one_device" (the first GPU, else the CPU), "mirrored" (all GPUs, else all
        logical CPUs), or "auto": mirrored with several GPUs, else one_device.
      jit: "on", "off" or "auto": compiled on every platform, since XLA is the fastest on each.

    Raises:
      ConfigError: there is no such strategy.
    """
    if name not in STRATEGIES:
        raise ConfigError(
            f"run.strategy = {name!r} is not a strategy; choose one of {', '.join(STRATEGIES)}"
        )
    if name == "cpu":  # before anything starts the GPUs: later they can't be hidden
        tf.config.set_visible_devices([], "GPU")
    gpus = tf.config.list_logical_devices("GPU")
    if name == "auto":
        name = "mirrored" if len(gpus) > 1 else "one_device"
    if name == "mirrored":
        devices = gpus or tf.config.list_logical_devices("CPU")
        strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
        kind = "GPUs" if gpus else "logical CPUs"
        placement = Placement(strategy, f"{len(devices)} mirrored {kind}", bool(gpus))
    elif gpus:
        strategy = tf.distribute.OneDeviceStrategy(gpus[0].name)
        placement = Placement(strategy, "one GPU", True)
    else:
        placement = Placement(tf.distribute.get_strategy(), "one CPU", False)
    return placement, jit != "off"


def half_dtype(precision: str) -> tf.DType | None:
    """The format of 16-bit blocks, or None for full precision throughout."""
    return {"float32": None, "bfloat16": tf.bfloat16, "float16": tf.float16}[precision]
