"""Everything a run carries from one step to the next, as named variables.

What isn't here, in the config or in the data set doesn't influence a run, so a checkpoint of these
variables is the whole run.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from trainer.objectives.phase import Networks, Objective, Trained
from trainer.training import loss_scale

Variables = dict[str, tf.Variable]


class TrainState:
    """The variables of a run. Create it in the scope of the strategy it will train under.

    Attributes:
      g, d, g_ema: parameters by NVIDIA's names.
      g_first, g_second, d_first, d_second: Adam's moments of the trainable ones.
      g_count, d_count: [] int64, Adam's steps.
      buffers: values that the objective carries from step to step, [] each.
      augment_p: [], probability of augmentation.
      augment_signs: [2], number and sum of the signs of real logits since p was last adjusted.
      stats: [3], number, sum and sum of squares of each statistic in this tick, by its name.
      images: [] int64, reals shown so far.
      step: [] int64, steps made so far.
      dtype: of all parameters and moments.
      nonfinite: [2] int64, the first step with a non-finite quantity and its place in
        `Objective.watched`; -1 while there is none.
      loss_scale: [], of each phase by its name; used and changed in float16 only.
      loss_scale_counts: [3] int64 of each phase, see `loss_scale.update`.

    Counters are int64 because XLA keeps int32 variables on the host.

    Args:
      networks: to train.
      objective: what they are trained to do.
      seed: for the initial parameters.
      augment_p: where the probability of augmentation starts.
      dtype: of all parameters and moments.
    """

    def __init__(
        self,
        networks: Networks,
        objective: Objective,
        *,
        seed: int,
        augment_p: float = 0.0,
        dtype: tf.DType = tf.float32,
    ) -> None:
        def create(name: str, value: object, dtype: tf.DType = dtype) -> tf.Variable:
            # TensorFlow allows no dots at the start of a scope, and names nothing by these names:
            # checkpoints use the keys of `variables`.
            return tf.Variable(value, dtype=dtype, trainable=False, name=name.replace("/", "."))

        def table(prefix: str, values: Mapping[str, np.ndarray]) -> Variables:
            return {name: create(f"{prefix}.{name}", value) for name, value in values.items()}

        g, d = networks.generator.init(seed), networks.discriminator.init(seed)
        g_zeros = {name: np.zeros_like(g[name]) for name in networks.trainable_names("G")}
        d_zeros = {name: np.zeros_like(d[name]) for name in networks.trainable_names("D")}
        self.g, self.d, self.g_ema = table("G", g), table("D", d), table("G_ema", g)
        self.g_first, self.g_second = table("G_first", g_zeros), table("G_second", g_zeros)
        self.d_first, self.d_second = table("D_first", d_zeros), table("D_second", d_zeros)
        self.g_count = create("G_count", 0, tf.int64)
        self.d_count = create("D_count", 0, tf.int64)
        self.buffers = {name: create(name, value) for name, value in objective.buffers.items()}
        self.augment_p = create("augment_p", augment_p)
        self.augment_signs = create("augment_signs", [0.0, 0.0])
        self.stats = {name: create(name, np.zeros([3])) for name in objective.reports}
        self.images = create("images", 0, tf.int64)
        self.step = create("step", 0, tf.int64)
        self.nonfinite = create("nonfinite", [-1, -1], tf.int64)
        # There in every precision, so that a run may go on in another one.
        phases = [phase.name for phase in objective.phases]
        self.loss_scale = {name: create(f"scale.{name}", loss_scale.INITIAL) for name in phases}
        self.loss_scale_counts = {
            name: create(f"counts.{name}", np.zeros([3], np.int64), tf.int64) for name in phases
        }
        self.dtype = dtype
        self._watched = objective.watched
        self._parameters = {
            name: [parameter for parameter, spec in network.specs.items() if spec.trainable]
            for name, network in (("G", networks.generator), ("D", networks.discriminator))
        }

    def optimized(self, network: Trained) -> tuple[Variables, Variables, Variables, tf.Variable]:
        """Parameters, first and second moments and Adam's steps of "G" or "D"."""
        if network == "G":
            return self.g, self.g_first, self.g_second, self.g_count
        return self.d, self.d_first, self.d_second, self.d_count

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
            "objective": self.buffers,
            "stats": self.stats,
            "loss_scale/value": self.loss_scale,
            "loss_scale/counts": self.loss_scale_counts,
        }
        flat = {
            f"{prefix}/{name}": variable
            for prefix, table in tables.items()
            for name, variable in table.items()
        }
        return flat | {
            "G_opt/count": self.g_count,
            "D_opt/count": self.d_count,
            "augment/p": self.augment_p,
            "augment/signs": self.augment_signs,
            "counters/images": self.images,
            "counters/step": self.step,
            "nonfinite": self.nonfinite,
        }

    def optional(self) -> set[str]:
        """Those that may be missing in a checkpoint, and then start where they are created.

        All but what was trained and what counts: the checkpoint may be of a config before a phase,
        a penalty or a buffer was added, or while more layers were frozen.
        """
        changing = ("G/", "D/", "G_ema/", "G_opt/", "D_opt/", "objective/", "stats/", "loss_scale/")
        required = {"G_opt/count", "D_opt/count"} | {
            f"{table}/{name}"
            for network, tables in (("G", ("G", "G_ema")), ("D", ("D",)))
            for table in tables
            for name in self._parameters[network]
        }
        return {name for name in self.variables() if name.startswith(changing)} - required

    def nonfinite_variables(self) -> str | None:
        """Names the variables that hold values that are not finite, None if none does."""
        named = {k: v for k, v in self.variables().items() if v.dtype.is_floating}
        finite = _are_finite([tf.convert_to_tensor(v) for v in named.values()]).numpy()
        wrong = [name for name, fine in zip(named, finite, strict=True) if not fine]
        if not wrong:
            return None
        more = f" and {len(wrong) - 1} more variables are" if len(wrong) > 1 else " is"
        return f"{wrong[0]}{more} not finite after step {int(self.step.numpy())}"

    def nonfinite_message(self) -> str | None:
        """Names the first step and quantity that was not finite, None while all are."""
        step, quantity = self.nonfinite.numpy().tolist()
        if step < 0:
            return None
        phase, name = self._watched[quantity]
        in_a_row = self.loss_scale_counts[phase].numpy()[loss_scale.IN_A_ROW]
        if in_a_row >= loss_scale.MAX_SKIPPED:
            return (
                f"{name} of {phase} were not finite in float16 {in_a_row} times in a row, at last "
                f"at step {step}"
            )
        return f"{name} of {phase} is not finite at step {step}"


@tf.function(autograph=False)
def _are_finite(values: list[tf.Tensor]) -> tf.Tensor:
    return tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in values])
