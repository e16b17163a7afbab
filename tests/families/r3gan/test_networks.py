"""R3GAN's networks and losses against the authors' values."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.augment.test_pipe import percentile_draws
from tests.families.stylegan2.test_networks import constants, error, load, nhwc, part, randomized
from trainer.augment.pipe import AugmentPipe
from trainer.config import ObjectiveConfig
from trainer.families.network import Latents
from trainer.families.r3gan.keys import Layout
from trainer.families.r3gan.networks import Discriminator, Generator
from trainer.layers.ops import Backend
from trainer.objectives.objective import objective
from trainer.objectives.phase import Networks
from trainer.objectives.sampler import Draws

# The goldens' own rounding: 5e-7 for values, 7e-6 for gradients; behind kinks of the augmentation 1e-4
# and 1e-3 are allowed.
VALUES, GRADIENTS = 1e-5, 1e-4
GOLDENS = ["r3gan_net32_c0.npz", "r3gan_net32_c10.npz"]

# R3GAN's loss, with the weights of the penalties left open.
LOSS: dict[str, Any] = {
    "adversarial": "relativistic",
    "first": "D",
    "d_reg_interval": None,
    "pl_weight": 0,
    "g_reg_interval": None,
}


class Recorded:
    """The networks and inputs of a golden file."""

    def __init__(self, name: str, dtype: tf.DType = tf.float32, **options: Any) -> None:
        self.golden = load(name)
        self.meta = json.loads(str(self.golden["meta_json"]))
        g, d = self.meta["G_kwargs"], self.meta["D_kwargs"]
        assert list(reversed(d["WidthPerStage"])) == g["WidthPerStage"]
        layout = Layout(
            c_dim=g.get("ConditionDimension", 0),
            resolution=(32, 32),
            img_channels=3,
            widths=tuple(g["WidthPerStage"]),
            blocks=tuple(g["BlocksPerStage"]),
            group_channels=16,
        )
        self.g = Generator(layout, z_dim=g["NoiseDimension"], **options)
        self.d = Discriminator(layout, **options)
        self.g_params = constants(self.g.from_nvidia(part(self.golden, "G/")), dtype)
        self.d_params = constants(self.d.from_nvidia(part(self.golden, "D/")), dtype)
        self.z = tf.constant(self.golden["in/z"], dtype)
        self.c = tf.constant(self.golden.get("in/c", np.zeros([len(self.z), 0])), dtype)
        reals = nhwc(self.golden["in/real_u8"]) / 127.5 - 1
        self.reals = tf.constant(reals, dtype)

    def images(self) -> tf.Tensor:
        return self.g.apply(self.g_params, Latents(self.z, self.c)).values


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("backend", Backend)
def test_values(name: str, backend: Backend) -> None:
    recorded = Recorded(name, backend=backend)
    golden, images = recorded.golden, recorded.images()
    assert error(images, nhwc(golden["out/img"])) < VALUES
    for kind, shown in (("real", recorded.reals), ("fake", images)):
        logits = recorded.d(recorded.d_params, shown, recorded.c)
        assert error(logits[:, 0], golden[f"out/logits_{kind}"]) < VALUES


@pytest.mark.parametrize("name", GOLDENS)
def test_float64(name: str) -> None:
    recorded = Recorded(name, tf.float64)
    images = recorded.images()
    assert images.dtype == tf.float64
    assert error(images[:2], nhwc(recorded.golden["f64/out/img"])) < 1e-6
    logits = recorded.d(recorded.d_params, images, recorded.c)
    assert error(logits[:, 0], recorded.golden["f64/out/logits_fake"]) < 1e-6


def statistics(value: tf.Tensor) -> np.ndarray:
    """Sum, sum of squares, sum and largest of the absolute values."""
    array = np.asarray(value, np.float64)
    absolute = np.abs(array)
    return np.array([array.sum(), np.square(array).sum(), absolute.sum(), absolute.max()])


def assert_gradients(
    network: Generator | Discriminator, grads: dict[str, tf.Tensor], golden: dict[str, Any]
) -> None:
    """Against the recorded statistics of all, and all values of some."""
    stats = part(golden, "grad_stat/")
    assert set(stats) == set(grads)
    for name, expected in stats.items():
        found = statistics(grads[name])
        scales = expected[[2, 1, 2, 3]]
        np.testing.assert_array_less(np.abs(found - expected) / scales, GRADIENTS, err_msg=name)
    full = part(golden, "grad_full/")
    arrays = network.to_nvidia({name: value.numpy() for name, value in grads.items()})
    for name, expected in full.items():
        assert error(arrays[name], expected) < GRADIENTS, name


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("augmented", ["noaug", "aug0.3", "aug0.7"])
def test_losses_and_gradients(name: str, augmented: str) -> None:
    """Through the phases of a step, both penalties taken before the augmentation.

    In float64, since in float32 a leaky ReLU's kink may be met on either side.
    """
    recorded = Recorded(name, tf.float64)
    golden = part(recorded.golden, f"{augmented}/")
    gamma, num = recorded.meta["gamma"], len(recorded.z)
    pipe, drawn = None, {}
    if augmented != "noaug":
        pipe = AugmentPipe.preset("bgc-cutout", color=0.5)
        drawn = {
            field: tf.cast(value, tf.float64)
            for field, value in percentile_draws(float(augmented[3:]), num).items()
        }
    networks = Networks(
        generator=recorded.g,
        discriminator=recorded.d,
        pipe=pipe,
        group_size=4,
        freeze_d=0,
        static_shapes=False,
    )
    keys = ObjectiveConfig(**LOSS, r1_gamma=gamma, r2_gamma=gamma)
    phases = {phase.name: phase for phase in objective(keys, 4).phases}
    latents = Latents(recorded.z, recorded.c)
    inputs: dict[str, Any] = {
        "g": recorded.g_params,
        "d": recorded.d_params,
        "draws": Draws(latents, augment_fake=drawn, augment_real=drawn),
        "p": tf.constant(1.0, tf.float64),
        "reals": recorded.reals,
        "c": recorded.c,
        "buffers": {},
        "numbers": {"r1_gamma": gamma, "r2_gamma": gamma, "gradient_penalty": 0.0},
        "mean": None,
        "scale": None,
    }
    for phase, network in (("Dmain", "D"), ("Gmain", "G")):
        expected = part(golden, f"{network}/")
        grads, report, sums = phases[phase].gradients(networks, num, inputs)
        assert not any(sums.values())
        np.testing.assert_allclose(
            report[f"Loss/{network}/loss"][1], expected["adv"].sum(), rtol=VALUES
        )
        if network == "D":
            for kind in ("r1", "r2"):
                found = report[f"Loss/{kind}_penalty"][1]
                np.testing.assert_allclose(found, expected[kind].sum(), rtol=1e-4)
            whole = (report["Loss/D/loss"][1] + report["Loss/D/reg"][1]) / num
            np.testing.assert_allclose(whole, expected["loss"], rtol=1e-4)
        assert_gradients(recorded.d if network == "D" else recorded.g, grads, expected)


def test_a_new_block_is_the_identity() -> None:
    """So a fresh generator's image is that of its first map, widened, upsampled and coloured."""
    recorded = Recorded(GOLDENS[0])
    params = constants(recorded.g.init(1))
    deeper = dict(params)
    for name, value in params.items():
        if ".LinearLayer2." in name or ".NonLinearity" in name:
            deeper[name] = value + 1
    latents = Latents(recorded.z, recorded.c)
    same = recorded.g.apply(deeper, latents).values
    np.testing.assert_array_equal(same, recorded.g.apply(params, latents).values)
    assert float(tf.math.reduce_std(same)) > 0.1


def test_16_bits_are_in_the_highest_stages_alone() -> None:
    recorded = Recorded(GOLDENS[0])
    for count in (1, 3):
        half = Recorded(GOLDENS[0], num_fp16_res=count, half_dtype=tf.bfloat16)
        found = half.images()
        assert found.dtype == tf.float32
        assert 1e-4 < error(found, recorded.images()) < 0.1
        logits = half.d(half.d_params, half.reals, half.c)
        assert logits.dtype == tf.float32
        dtypes = [dtype == tf.bfloat16 for dtype in half.g._dtypes]
        assert dtypes == [stage >= 4 - count for stage in range(4)]
        assert half.d._dtypes == list(reversed(half.g._dtypes))


def test_sizes_other_than_squares() -> None:
    layout = Layout(
        c_dim=0,
        resolution=(10, 14),
        img_channels=4,
        widths=(16, 8),
        blocks=(1, 2),
        group_channels=8,
    )
    g, d = Generator(layout, z_dim=4), Discriminator(layout)
    latents = Latents(tf.ones([3, 4]), tf.zeros([3, 0]))
    images = g.apply(constants(randomized(g)), latents).values
    assert images.shape == [3, 10, 14, 4]
    assert d(constants(randomized(d)), images, latents.c).shape == [3, 1]


def test_goldens_are_here() -> None:
    folder = pathlib.Path(__file__).parents[2] / "goldens"
    assert all((folder / name).exists() for name in GOLDENS)
