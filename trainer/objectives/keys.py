"""The `objective:` section: what both networks are trained to do, and what that costs.

Needs no TensorFlow.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from trainer.core.errors import ConfigError
from trainer.core.schedule import Number
from trainer.core.sections import (
    ABOVE_0_TO_1,
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    POSITIVE,
    Auto,
    Section,
    key,
)

# Losses of probabilities, whose target for reals can be less than 1.
_OF_PROBABILITIES = ("logistic", "minimax")
# Losses that pull the logits of reals above 0 and those of fakes below, as ADA takes for granted.
_AROUND_0 = (*_OF_PROBABILITIES, "hinge")
# Losses that anything but a penalty lets grow without bound.
_UNBOUNDED = ("wasserstein",)
# The discriminator's penalties: the key of the weight, and the images at which slopes are taken,
# "between" being those between a real and a fake.
D_PENALTIES: dict[str, Literal["reals", "fakes", "between"]] = {
    "r1_gamma": "reals",
    "r2_gamma": "fakes",
    "gradient_penalty": "between",
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Section):
    """Adversarial loss and penalties.

    Weights may follow a schedule, see `core.schedule`. A penalty of weight 0 is left out.

    Attributes:
      adversarial: the loss, see objectives/adversarial.py.
        'logistic': non-saturating, NVIDIA's.
        'minimax': saturating.
        'hinge': SAGAN's and BigGAN's.
        'least_squares': LSGAN's.
        'wasserstein': WGAN's.
        'relativistic': R3GAN's; a fake is compared with the real of its place in the batch, whose
        class it has.
      first: the network that a step trains first: 'G' as StyleGAN, or 'D' as WGAN and R3GAN.
      d_steps: updates of D in a step, each with a batch of reals of its own (WGAN: `n_critic`, 5).
        A step counts as one batch in kimg.
      r1_gamma: weight of the R1 penalty on slopes at reals (NVIDIA: --gamma). 'auto': 0.0002 *
        resolution^2 / batch.
      r2_gamma: weight of the R2 penalty on slopes at fakes (R3GAN: the same as of R1).
      gradient_penalty: weight of the penalty on slopes other than 1 between reals and fakes
        (WGAN-GP: lambda, 10).
      d_reg_interval: steps between two phases of D's penalties, which count for as many steps; the
        rate and decays of Adam are corrected for them (NVIDIA: 16). null: they are a part of D's
        loss at every step.
      pl_weight: weight of the path length penalty (NVIDIA: 2, or 0 in cifar); it needs networks
        with styles.
      pl_batch_shrink: the path length penalty takes the first 1/this of every group (NVIDIA: 2).
      pl_decay: rate at which the path length mean follows (NVIDIA: 0.01).
      g_reg_interval: steps between two path length phases, as for D (NVIDIA: 4). null: Adam is not
        corrected, where there is no such penalty.
      gradient_clip: all gradients of a network together are scaled down to this length; null
        leaves them.
      instance_noise: standard deviation of the noise on all that D sees, added after augmentation
        (Sonderby et al. 2017).
      label_smoothing: the target for reals is 1 minus this in place of 1 (Salimans et al. 2016).
    """

    NAME: ClassVar[str] = "objective"

    adversarial: Literal[
        "logistic",
        "minimax",
        "hinge",
        "least_squares",
        "wasserstein",
        "relativistic",
    ] = "logistic"
    first: Literal["G", "D"] = "G"
    d_steps: int = key(1, AT_LEAST_1)
    r1_gamma: Number | Auto = key(10.0, AT_LEAST_0)
    r2_gamma: Number = key(0.0, AT_LEAST_0)
    gradient_penalty: Number = key(0.0, AT_LEAST_0)
    d_reg_interval: int | None = key(16, AT_LEAST_1)
    pl_weight: Number = key(2.0, AT_LEAST_0)
    pl_batch_shrink: int = key(2, AT_LEAST_1)
    pl_decay: float = key(0.01, ABOVE_0_TO_1)
    g_reg_interval: int | None = key(4, AT_LEAST_1)
    gradient_clip: float | None = key(None, POSITIVE)
    instance_noise: Number = key(0.0, AT_LEAST_0)
    label_smoothing: float = key(0.0, BELOW_1)

    @property
    def is_relativistic(self) -> bool:
        """Whether the generator's loss compares with reals."""
        return self.adversarial == "relativistic"

    @property
    def d_penalties(self) -> tuple[str, ...]:
        """The keys of the discriminator's penalties that have a weight."""
        return tuple(name for name in D_PENALTIES if getattr(self, name) != 0)

    @property
    def batches(self) -> int:
        """Batches of reals that a step reads."""
        return self.d_steps + self.is_relativistic

    def check(self, *, styles: bool, family: str, ada: bool) -> None:
        """Refuses what makes no sense together.

        Args:
          styles: whether the generator has styles.
          family: of the networks.
          ada: whether the strength of augmentation is steered.

        Raises:
          ConfigError: saying what to change.
        """
        loss = self.adversarial
        if self.pl_weight != 0 and not styles:
            raise ConfigError(
                f"objective.pl_weight: path length is measured in styles, and {family} has none; "
                "set it to 0"
            )
        if self.pl_weight != 0 and self.g_reg_interval is None:
            raise ConfigError(
                "objective.g_reg_interval = null: path length needs phases of its own; set it to "
                "1 or more, or objective.pl_weight to 0"
            )
        if self.label_smoothing and loss not in _OF_PROBABILITIES:
            raise ConfigError(
                f"objective.label_smoothing: {loss} has no labels to smooth; set it to 0, or "
                f"objective.adversarial to {' or '.join(_OF_PROBABILITIES)}"
            )
        if self.gradient_penalty != 0 and len(self.d_penalties) > 1:
            raise ConfigError(
                f"objective.gradient_penalty pulls slopes to 1 and {self.d_penalties[0]} pulls "
                "them to 0; set one of them to 0"
            )
        if loss in _UNBOUNDED and not self.d_penalties:
            raise ConfigError(
                f"objective.adversarial = {loss}: nothing bounds the discriminator; set "
                "objective.gradient_penalty (WGAN-GP: 10)"
            )
        if ada and loss not in _AROUND_0:
            raise ConfigError(
                f"augment.mode = ada steers by the signs of logits, which say nothing under {loss}; "
                "set it to fixed or none"
            )

    def passes(self) -> tuple[float, float]:
        """(G, D): forward passes of one image that a step costs for each image of its batch.

        A gradient in the inputs and one in the weights cost as much as the pass itself, and
        differentiating a gradient doubles what it cost.
        """
        # G's update; then fakes for D, and fakes and reals through D.
        g, d = 3.0 + self.d_steps, 2.0 + self.is_relativistic + 6.0 * self.d_steps
        penalised = [D_PENALTIES[name] for name in self.d_penalties]
        if self.d_reg_interval is None:
            # Fakes and reals have passed D already.
            d += self.d_steps * sum(6 if images == "between" else 3 for images in penalised)
        else:
            d += 6 * len(penalised) / self.d_reg_interval
            g += any(images != "reals" for images in penalised) / self.d_reg_interval
        if self.pl_weight != 0 and self.g_reg_interval:
            g += 6 / self.pl_batch_shrink / self.g_reg_interval
        return g, d
