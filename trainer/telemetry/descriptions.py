"""What the statistics of a run mean, by their names; TensorBoard shows it with each curve."""

from __future__ import annotations

_TEXTS = {
    "Loss/G/loss": "Loss of the generator, without regularisation.",
    "Loss/D/loss": "Loss of the discriminator on reals and fakes, without regularisation.",
    "Loss/G/reg": "Weighted regularisation of the generator, in the steps that have it.",
    "Loss/D/reg": "Weighted penalties of the discriminator, in the steps that have them.",
    "Loss/scores/fake": "Logits of the discriminator for generated images.",
    "Loss/scores/real": "Logits of the discriminator for real images.",
    "Loss/signs/fake": "Signs of the logits for generated images: -1 where D knows all of them.",
    "Loss/signs/real": "Signs of the logits for real images, r_t in the ADA paper: near 1 D overfits.",
    "Loss/r1_penalty": "R1: squared length of D's gradient at real images, unweighted.",
    "Loss/r2_penalty": "R2: squared length of D's gradient at generated images, unweighted.",
    "Loss/gradient_penalty": "WGAN-GP: squared distance of the gradient's length from 1, unweighted.",
    "Loss/pl_penalty": "Path length regularisation of the generator, unweighted.",
    "Progress/tick": "Number of the tick.",
    "Progress/kimg": "Thousands of real images shown to the discriminator.",
    "Progress/variety": "Distance between the grid's fakes, divided by that between its reals.",
    "Progress/augment": "Probability p of each augmentation.",
    "Timing/total_sec": "Wall time of the whole run, earlier processes included.",
    "Timing/sec_per_tick": "Wall time of the tick, maintenance left out.",
    "Timing/sec_per_kimg": "Wall time of 1000 images, maintenance left out.",
    "Timing/maintenance_sec": "Wall time between two ticks: images, checkpoints, exports.",
    "Resources/cpu_mem_gb": "Resident memory of the process now, in GiB.",
    "Resources/peak_mem_gb": "Largest resident memory of the process so far, in GiB.",
    "Resources/peak_gpu_mem_gb": "Largest memory in use on any GPU during the tick, in GiB.",
}
_PREFIXES = {
    "Schedule/": "Value of {} now, by its schedule.",
    "Precision/loss_scale/": "Loss scale of the phase {} now.",
    "Precision/skipped/": "Updates of the phase {} skipped in the tick, as not finite.",
}


def describe(name: str) -> str:
    """A sentence on a statistic, such as `Loss/G/loss`; '' for a name that is unknown."""
    for prefix, text in _PREFIXES.items():
        if name.startswith(prefix):
            return text.format(name.removeprefix(prefix))
    return _TEXTS.get(name, "")
