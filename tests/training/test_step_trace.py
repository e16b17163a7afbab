"""Three iterations of NVIDIA's training loop, reproduced by the training step itself."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer import config as config_lib
from trainer.families.network import Latents
from trainer.families.stylegan2.networks import Discriminator, Generator
from trainer.objectives import objective as objectives
from trainer.objectives.phase import Networks, Phase
from trainer.objectives.sampler import Draws
from trainer.training.state import TrainState
from trainer.training.step import TrainStep

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "sg2_train_trace_c0.npz"

# NVIDIA's groups for minibatch-stddev stride through the batch, ours are consecutive.
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


class RecordedDraws:
    """What NVIDIA's run drew, served as the step asks for it."""

    def __init__(self, golden: dict[str, np.ndarray]) -> None:
        self._golden = golden
        self._values = {
            name: tf.Variable(np.zeros(shape, np.float32))
            for name, shape in {
                "Gmain": (8, 32),
                "Greg": (8, 32),
                "Dmain": (8, 32),
                "pl_randn": (8, 32, 32, 3),
            }.items()
        }

    def select(self, iteration: int) -> None:
        for phase in ("Gmain", "Greg", "Dmain"):
            self._values[phase].assign(self._golden[f"it{iteration}/{phase}/z"][ORDER])
        # The first half of each of our groups is the first half of NVIDIA's batch.
        noise = np.zeros([8, 32, 32, 3], np.float32)
        noise[:4] = self._golden[f"it{iteration}/Greg/pl_randn"].transpose(0, 2, 3, 1)
        self._values["pl_randn"].assign(noise[ORDER])

    def __call__(self, phase: Phase, group_index: tf.Tensor) -> Draws:
        count = 2 if phase.name == "Greg" else 4
        rows = tf.reshape(
            4 * (group_index[:, tf.newaxis] % 2) + tf.range(count, dtype=tf.int64), [-1]
        )
        rows = tf.ensure_shape(rows, [group_index.shape[0] * count])
        if phase.name == "Dreg":
            return Draws()
        z = tf.gather(tf.convert_to_tensor(self._values[phase.name]), rows)
        size = z.shape[0]
        latents = Latents(z, tf.zeros([size, 0]), z, tf.fill([size], 100), tf.zeros([size, 0]))
        if phase.name == "Greg":
            noise = tf.gather(tf.convert_to_tensor(self._values["pl_randn"]), rows)
            return Draws(latents, image_noise=noise)
        return Draws(latents)


class Trace:
    """A training run set up as the recorded one was."""

    def __init__(self, golden: dict[str, np.ndarray], *, rounds: int, jit: bool) -> None:
        meta = json.loads(str(golden["meta_json"]))
        sizes = {"resolution": (32, 32), "channel_base": 512, "channel_max": 32, "c_dim": 0}
        self.g = Generator(z_dim=32, w_dim=32, mapping_layers=2, noise_mode="const", **sizes)
        self.d = Discriminator(mbstd_group_size=4, mapping_layers=2, **sizes)
        config = config_lib.from_dict(
            {
                "training": {
                    "batch_size": 8,
                    "group_size": 4,
                    "rounds": rounds,
                    "g_lr": 0.0025,
                    "d_lr": 0.0025,
                    "ema_kimg": 0.02,
                },
                "objective": {"r1_gamma": meta["r1_gamma"], "pl_weight": meta["pl_weight"]},
                "augment": {"mode": "none"},
            }
        )
        networks = Networks(
            generator=self.g,
            discriminator=self.d,
            pipe=None,
            group_size=4,
            freeze_d=0,
            static_shapes=jit,
        )
        objective = objectives.objective(config.objective, 4)
        self.state = TrainState(networks, objective, seed=0)
        for prefix, network, table in (
            ("G0/", self.g, self.state.g),
            ("D0/", self.d, self.state.d),
        ):
            arrays = {k[len(prefix) :]: v for k, v in golden.items() if k.startswith(prefix)}
            for name, value in network.from_nvidia(arrays).items():
                table[name].assign(value)
        for name, variable in self.state.g_ema.items():
            variable.assign(self.state.g[name])
        self.draws = RecordedDraws(golden)
        self.step = TrainStep(
            config,
            config_lib.batch_arithmetic(config, 1),
            tf.distribute.get_strategy(),
            self.state,
            networks,
            objective,
            self.draws,
            jit=jit,
        )
        self._golden = golden

    def iterate(self, iteration: int) -> dict[str, dict[str, Any]]:
        self.draws.select(iteration)
        real = self._golden[f"it{iteration}/real"].transpose(0, 2, 3, 1)[ORDER]
        images = tf.constant(real.reshape(2, 4, 32, 32, 3))
        labels = tf.fill([2, 4], tf.constant(-1, tf.int64))
        # The recorded run regularised at every iteration, which the step does with its first groups.
        return self.step(images, labels, tf.range(2, dtype=tf.int64))


def relative(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30))


def sums_of_squares(
    network: Any, table: dict[str, tf.Variable], names: list[str]
) -> dict[str, float]:
    return {
        name: float(np.sum(np.square(table[name].numpy().astype(np.float64)))) for name in names
    }


@pytest.mark.parametrize(
    ("rounds", "jit"), [(1, False), pytest.param(2, True, marks=pytest.mark.slow)]
)
def test_three_iterations(golden: dict[str, np.ndarray], rounds: int, jit: bool) -> None:
    trace = Trace(golden, rounds=rounds, jit=jit)
    names = {
        "Gmain": {
            "scores/fake": "Loss/scores/fake",
            "signs/fake": "Loss/signs/fake",
            "G/loss": "Loss/G/loss",
        },
        "Greg": {"pl_penalty": "Loss/pl_penalty", "G/reg": "Loss/G/reg"},
        "Dmain": {
            "scores/fake": "Loss/scores/fake",
            "scores/real": "Loss/scores/real",
            "signs/real": "Loss/signs/real",
            "D/loss": "Loss/D/loss",
        },
        "Dreg": {
            "scores/real": "Loss/scores/real",
            "r1_penalty": "Loss/r1_penalty",
            "D/reg": "Loss/D/reg",
        },
    }
    for iteration in (1, 2, 3):
        reports = trace.iterate(iteration)
        for phase, stats in names.items():
            for theirs, ours in stats.items():
                count, total, _ = reports[phase][ours].numpy()
                assert count == (4 if phase == "Greg" else 8)
                expected = golden[f"it{iteration}/{phase}/{theirs}"][0]
                assert total / count == pytest.approx(expected, rel=1e-4, abs=1e-6), (
                    iteration,
                    phase,
                    ours,
                )
            gradients = golden[f"it{iteration}/{phase}/grad_sumsq"]
            assert reports[phase]["gradients"].numpy() == pytest.approx(gradients, rel=2e-4), (
                iteration,
                phase,
            )
        state = trace.state
        assert relative(state.buffers["pl_mean"], golden[f"it{iteration}/pl_mean"]) < 1e-5
        assert relative(state.g["mapping.w_avg"], golden[f"it{iteration}/w_avg"]) < 1e-5
        for key, table in (("G", state.g), ("D", state.d), ("Gema", state.g_ema)):
            prefix = f"it{iteration}/{key}_sumsq/"
            expected = {
                k[len(prefix) :]: float(v) for k, v in golden.items() if k.startswith(prefix)
            }
            actual = sums_of_squares(None, table, list(expected))
            assert sum(actual.values()) == pytest.approx(
                float(golden[f"it{iteration}/{key}_sumsq_total"]), rel=2e-6
            )
            for name, value in expected.items():
                assert actual[name] == pytest.approx(value, rel=3e-4, abs=1e-6), (
                    iteration,
                    key,
                    name,
                )
