"""Everything a run carries from one step to the next, as named variables.

What isn't here, in the config or in the data set doesn't influence a run, so a checkpoint of these
variables is the whole run.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from trainer.families.network import Discriminator, StyleGenerator
from trainer.training import loss_scale

Variables = dict[str, tf.Variable]

PHASES = ("Gmain", "Greg", "Dmain", "Dreg")

# What a step reports, under NVIDIA's names.
STATS = (
    "Loss/scores/fake",
    "Loss/signs/fake",
    "Loss/G/loss",
    "Loss/pl_penalty",
    "Loss/G/reg",
    "Loss/scores/real",
    "Loss/signs/real",
    "Loss/D/loss",
    "Loss/r1_penalty",
    "Loss/D/reg",
)

# What is watched for non-finite values: in each phase its losses, and all gradients together.
QUANTITIES = (
    ("Gmain", "Loss/G/loss"),
    ("Gmain", "gradients"),
    ("Greg", "Loss/pl_penalty"),
    ("Greg", "gradients"),
    ("Dmain", "Loss/D/loss"),
    ("Dmain", "gradients"),
    ("Dreg", "Loss/r1_penalty"),
    ("Dreg", "gradients"),
)


class TrainState:
    """The variables of a run. Create it in the scope of the strategy it will train under.

    Attributes:
      g, d, g_ema: parameters by NVIDIA's names.
      g_first, g_second, d_first, d_second: Adam's moments of the trainable ones.
      g_count, d_count: [] int64, Adam's steps.
      pl_mean: [], moving mean of path lengths.
      augment_p: [], probability of augmentation.
      augment_signs: [2], number and sum of the signs of real logits since p was last adjusted.
      stats: [len(STATS), 3], number, sum and sum of squares of each statistic in this tick.
      images: [] int64, reals shown so far.
      step: [] int64, steps made so far.
      nonfinite: [2] int64, the first step with a non-finite quantity and its place in
        `QUANTITIES`; -1 while there is none.
      loss_scale: [4], of each of `PHASES`; used and changed in float16 only.
      loss_scale_counts: [4, 3] int64, see `loss_scale.update`.

    Counters are int64 because XLA keeps int32 variables on the host.

    Args:
      generator, discriminator: the networks.
      seed: for the initial parameters.
      freeze_d: layers of the discriminator that don't train.
      augment_p: where the probability of augmentation starts.
      dtype: of all parameters and moments.
    """

    def __init__(
        self,
        generator: StyleGenerator,
        discriminator: Discriminator,
        *,
        seed: int,
        freeze_d: int = 0,
        augment_p: float = 0.0,
        dtype: tf.DType = tf.float32,
    ) -> None:
        def create(name: str, value: object, dtype: tf.DType = dtype) -> tf.Variable:
            # TensorFlow allows no dots at the start of a scope, and names nothing by these names:
            # checkpoints use the keys of `variables`.
            return tf.Variable(value, dtype=dtype, trainable=False, name=name.replace("/", "."))

        def table(prefix: str, values: Mapping[str, np.ndarray]) -> Variables:
            return {name: create(f"{prefix}.{name}", value) for name, value in values.items()}

        g, d = generator.init(seed), discriminator.init(seed)
        g_zeros = {name: np.zeros_like(g[name]) for name in generator.trainable_names()}
        d_zeros = {name: np.zeros_like(d[name]) for name in discriminator.trainable_names(freeze_d)}
        self.g, self.d, self.g_ema = table("G", g), table("D", d), table("G_ema", g)
        self.g_first, self.g_second = table("G_first", g_zeros), table("G_second", g_zeros)
        self.d_first, self.d_second = table("D_first", d_zeros), table("D_second", d_zeros)
        self.g_count = create("G_count", 0, tf.int64)
        self.d_count = create("D_count", 0, tf.int64)
        self.pl_mean = create("pl_mean", 0.0)
        self.augment_p = create("augment_p", augment_p)
        self.augment_signs = create("augment_signs", [0.0, 0.0])
        self.stats = create("stats", np.zeros([len(STATS), 3]))
        self.images = create("images", 0, tf.int64)
        self.step = create("step", 0, tf.int64)
        self.nonfinite = create("nonfinite", [-1, -1], tf.int64)
        # There in every precision, so that a run may go on in another one.
        self.loss_scale = create("loss_scale", [loss_scale.INITIAL] * len(PHASES))
        self.loss_scale_counts = create(
            "loss_scale_counts", np.zeros([len(PHASES), 3], np.int64), tf.int64
        )

    def variables(self) -> Variables:
        """All of them by the names they have in a checkpoint (`G/synthesis.b4.const`)."""
        tables = {
            "G": self.g,
            "D": self.d,
            "G_ema": self.g_ema,
            "G_opt/first": self.g_first,
            "G_opt/second": self.g_second,
            "D_opt/first": self.d_first,
            "D_opt/second": self.d_second,
        }
        flat = {
            f"{prefix}/{name}": variable
            for prefix, table in tables.items()
            for name, variable in table.items()
        }
        return flat | {
            "G_opt/count": self.g_count,
            "D_opt/count": self.d_count,
            "pl_mean": self.pl_mean,
            "augment/p": self.augment_p,
            "augment/signs": self.augment_signs,
            "stats": self.stats,
            "counters/images": self.images,
            "counters/step": self.step,
            "nonfinite": self.nonfinite,
            "loss_scale/value": self.loss_scale,
            "loss_scale/counts": self.loss_scale_counts,
        }

    def nonfinite_variables(self) -> str | None:
        """Which variables hold values that are not finite, or None if none does."""
        named = {k: v for k, v in self.variables().items() if v.dtype.is_floating}
        finite = _are_finite([tf.convert_to_tensor(v) for v in named.values()]).numpy()
        wrong = [name for name, fine in zip(named, finite, strict=True) if not fine]
        if not wrong:
            return None
        more = f" and {len(wrong) - 1} more variables are" if len(wrong) > 1 else " is"
        return f"{wrong[0]}{more} not finite after step {int(self.step.numpy())}"

    def nonfinite_message(self) -> str | None:
        """Which quantity of which step was first not finite, or None while all are."""
        step, quantity = self.nonfinite.numpy().tolist()
        if step < 0:
            return None
        phase, name = QUANTITIES[quantity]
        in_a_row = self.loss_scale_counts.numpy()[PHASES.index(phase), loss_scale.IN_A_ROW]
        if in_a_row >= loss_scale.MAX_SKIPPED:
            return (
                f"{name} of {phase} were not finite in float16 {in_a_row} times in a row, at last "
                f"at step {step}"
            )
        return f"{name} of {phase} is not finite at step {step}"


@tf.function(autograph=False)
def _are_finite(values: list[tf.Tensor]) -> tf.Tensor:
    return tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in values])
