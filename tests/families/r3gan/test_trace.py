"""Five steps of the authors' training, made by the real training step with the real schedules."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.families.r3gan.test_networks import LOSS, Recorded
from tests.families.stylegan2.test_networks import error, load, nhwc, part
from trainer import config as config_lib
from trainer.families.network import Latents
from trainer.objectives.objective import objective
from trainer.objectives.phase import Networks, Phase
from trainer.objectives.sampler import Draws
from trainer.training.state import TrainState
from trainer.training.step import TrainStep

BATCH = 16


class Trace:
    """A run set up as the recorded one was, in `rounds` rounds."""

    def __init__(self, rounds: int, dtype: tf.DType, *, jit: bool) -> None:
        self.golden = load("r3gan_train_trace_c0.npz")
        meta = json.loads(str(self.golden["meta_json"]))
        self.recorded, self.dtype = Recorded("r3gan_net32_c0.npz", dtype), dtype

        def schedule(name: str, unit: float = 1.0) -> dict[str, Any]:
            way = meta["schedulers"][name]
            ends = [way["base_value"] / unit, way["final_value"] / unit]
            return {"cosine": ends, "kimg": way["total_nimg"] / 1000}

        gamma = schedule("gamma")
        self.config = config_lib.from_dict(
            {
                "model": {"family": "r3gan"},
                "objective": {**LOSS, "r1_gamma": gamma, "r2_gamma": gamma},
                "training": {
                    "batch_size": BATCH,
                    "group_size": BATCH // rounds,
                    "rounds": rounds,
                    "g_lr": schedule("lr"),
                    "d_lr": schedule("lr"),
                    "beta2": schedule("beta2"),
                    "ema_kimg": schedule("ema", 1000),
                },
                "augment": {"mode": "none"},
            }
        )
        networks = Networks(
            generator=self.recorded.g,
            discriminator=self.recorded.d,
            pipe=None,
            group_size=BATCH // rounds,
            freeze_d=0,
            static_shapes=jit,
        )
        phases = objective(self.config.objective, BATCH // rounds)
        self.state = TrainState(networks, phases, seed=0, dtype=dtype)
        for params, *tables in (
            (self.recorded.g_params, self.state.g, self.state.g_ema),
            (self.recorded.d_params, self.state.d),
        ):
            for table in tables:
                for name, value in params.items():
                    table[name].assign(value)
        self.latents = {name: tf.Variable(tf.zeros([BATCH, 32], dtype)) for name in ("D", "G")}
        self.step = TrainStep(
            self.config,
            config_lib.batch_arithmetic(self.config, 1),
            tf.distribute.get_strategy(),
            self.state,
            networks,
            phases,
            self.draw,
            jit=jit,
        )
        self.rounds = rounds

    def draw(self, phase: Phase, group_index: tf.Tensor) -> Draws:
        size = BATCH // self.rounds
        groups = tf.reshape(tf.convert_to_tensor(self.latents[phase.trains]), [-1, size, 32])
        # Each network's batch has as many groups as there are rounds.
        z = tf.gather(groups, group_index % self.rounds)
        z = tf.ensure_shape(tf.reshape(z, [-1, 32]), [group_index.shape[0] * size, 32])
        return Draws(Latents(z, tf.zeros([z.shape[0], 0], self.dtype)))

    def iterate(self, iteration: int) -> dict[str, dict[str, tf.Tensor]]:
        recorded = part(self.golden, f"in/it{iteration}/")
        for network, z in self.latents.items():
            z.assign(tf.cast(recorded[f"z_{network}"], self.dtype))
        reals = np.concatenate([nhwc(recorded[f"real_{network}_u8"]) for network in ("D", "G")])
        groups = 2 * self.rounds
        images = tf.constant(reals.reshape(groups, -1, 32, 32, 3))
        labels = tf.fill(images.shape[:2], tf.constant(-1, tf.int64))
        first = groups * (iteration - 1)
        return self.step(images, labels, tf.range(first, first + groups, dtype=tf.int64))


@pytest.mark.parametrize(
    ("rounds", "dtype", "jit"),
    [(1, tf.float64, False), pytest.param(2, tf.float32, True, marks=pytest.mark.slow)],
)
def test_five_steps(rounds: int, dtype: tf.DType, jit: bool) -> None:
    """In float64 to what the recorded run rounded; in float32 a little less closely.

    Where a unit of D's last block is on for all images, its bias cancels in differences of logits,
    and Adam moves it by what rounding leaves of its gradient.
    """
    trace = Trace(rounds, dtype, jit=jit)
    exactly = 1e-5 if dtype == tf.float64 else 5e-5
    for iteration in range(1, 6):
        golden = part(trace.golden, f"it{iteration}/")
        scheduled = part(trace.golden, f"f64/it{iteration}/sched/")
        kimg = float(trace.state.images.numpy()) / 1000
        for key, expected in (
            (trace.config.training.g_lr, scheduled["lr"]),
            (trace.config.training.beta2, scheduled["beta2"]),
            (trace.config.objective.r1_gamma, scheduled["gamma"]),
            (trace.config.training.ema_kimg, scheduled["ema"] / 1000),
        ):
            assert isinstance(key, config_lib.Schedule)
            assert key.at(kimg) == pytest.approx(float(expected), rel=1e-9)
        reports = trace.iterate(iteration)
        close = 5e-5 if iteration == 1 else 5e-3
        for network, names in (
            ("D", {"adv": "Loss/D/loss", "r1": "Loss/r1_penalty", "r2": "Loss/r2_penalty"}),
            ("G", {"adv": "Loss/G/loss"}),
        ):
            report = reports[f"{network}main"]
            for theirs, ours in names.items():
                count, total, squares = report[ours].numpy()
                values = golden[f"{network}/{theirs}"].astype(np.float64)
                assert count == BATCH
                assert total == pytest.approx(values.sum(), rel=close), (iteration, ours)
                assert squares == pytest.approx(np.square(values).sum(), rel=2 * close)
            stats = part(golden, f"{network}/grad_stat/")
            if stats:
                whole = sum(float(values[1]) for values in stats.values())
                assert report["gradients"].numpy() == pytest.approx(whole, rel=1e-3)
        for prefix, table in (
            ("G", trace.state.g),
            ("D", trace.state.d),
            ("G_ema", trace.state.g_ema),
        ):
            for name, expected in part(golden, f"sumsq/{prefix}/").items():
                found = np.square(table[name].numpy().astype(np.float64)).sum()
                assert found == pytest.approx(float(expected), rel=exactly), (
                    iteration,
                    prefix,
                    name,
                )
    tables = {"G": trace.state.g, "D": trace.state.d, "G_ema": trace.state.g_ema}
    networks = {"G": trace.recorded.g, "D": trace.recorded.d, "G_ema": trace.recorded.g}
    for prefix, table in tables.items():
        found = networks[prefix].to_nvidia({name: value.numpy() for name, value in table.items()})
        for name, expected in part(trace.golden, f"end/{prefix}/").items():
            assert error(found[name], expected) < 2e-4, name
    params = {name: tf.convert_to_tensor(value) for name, value in trace.state.g_ema.items()}
    latents = Latents(tf.constant(trace.golden["in/eval_z"], dtype), tf.zeros([2, 0], dtype))
    images = trace.recorded.g.apply(params, latents).values
    assert error(images, nhwc(trace.golden["end/img_ema"])) < 1e-4
