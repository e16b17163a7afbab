"""The variables of a run: what there is, under which names, and where it starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tests.training.conftest import TINY_MODEL
from trainer import config as config_lib
from trainer.families.protocol import DataShape
from trainer.training import build, loss_scale
from trainer.training.build import Recipe
from trainer.training.state import TrainState


def make(*, freeze_d: int = 0, **options: Any) -> tuple[TrainState, Recipe]:
    training = {"batch_size": 4, "freeze_d": freeze_d}
    config = config_lib.from_dict({"model": TINY_MODEL, "training": training})
    recipe = build.recipe(config, DataShape((8, 8), 3, ()))
    state = TrainState(recipe.networks, recipe.objective, **{"seed": 0, **options})
    return state, recipe


def test_names_are_nvidias_and_all_different() -> None:
    state, recipe = make()
    g, d = recipe.networks.generator, recipe.networks.discriminator
    variables = state.variables()
    for prefix, specs in (("G", g.specs), ("D", d.specs), ("G_ema", g.specs)):
        for name, spec in specs.items():
            assert variables[f"{prefix}/{name}"].shape == spec.shape
    assert "G/synthesis.b8.conv0.weight" in variables
    # Each variable once, and nothing of the state is left out.
    assert len({id(variable) for variable in variables.values()}) == len(variables)
    held = [v for v in vars(state).values() if isinstance(v, tf.Variable)]
    tables = [table for table in vars(state).values() if isinstance(table, dict)]
    held += [v for table in tables for v in table.values() if isinstance(v, tf.Variable)]
    assert {id(variable) for variable in held} == {id(v) for v in variables.values()}


def test_moments_are_of_what_trains() -> None:
    state, recipe = make(freeze_d=3)
    g, d = recipe.networks.generator, recipe.networks.discriminator
    assert set(state.g_first) == set(state.g_second) == set(g.trainable_names())
    assert "mapping.w_avg" not in state.g_first
    assert set(state.d_first) == set(state.d_second) == set(d.trainable_names(3))
    assert set(state.d_first) < set(state.d)
    for table in (state.g_first, state.g_second, state.d_first, state.d_second):
        assert not any(np.any(variable.numpy()) for variable in table.values())


def test_where_a_run_starts() -> None:
    state, again, other = (make(seed=s, augment_p=0.25)[0] for s in (4, 4, 5))
    for name, variable in state.g.items():
        np.testing.assert_array_equal(variable.numpy(), state.g_ema[name].numpy())
        np.testing.assert_array_equal(variable.numpy(), again.g[name].numpy())
    const = "synthesis.b4.const"
    assert np.any(state.g[const].numpy() != other.g[const].numpy())
    assert np.any(state.d["b4.conv.weight"].numpy() != other.d["b4.conv.weight"].numpy())
    assert state.augment_p.numpy() == 0.25
    assert state.nonfinite_message() is None
    assert state.step.dtype == state.images.dtype == state.g_count.dtype == tf.int64


def test_a_state_can_be_of_double_precision() -> None:
    state = make(dtype=tf.float64)[0]
    floats = {v.dtype for n, v in state.variables().items() if not v.dtype.is_integer}
    assert floats == {tf.float64}


def test_message_of_a_nonfinite_quantity() -> None:
    state, recipe = make()
    for index, (phase, name) in enumerate(recipe.objective.watched):
        state.nonfinite.assign([17, index])
        assert state.nonfinite_message() == f"{name} of {phase} is not finite at step 17"


def test_message_of_a_row_of_skipped_updates() -> None:
    """It is the phase's own row that counts, and its length."""
    state, recipe = make()
    state.nonfinite.assign([17, recipe.objective.watched.index(("Dmain", "gradients"))])
    state.loss_scale_counts["Gmain"].assign([0, 0, loss_scale.MAX_SKIPPED])
    assert state.nonfinite_message() == "gradients of Dmain is not finite at step 17"
    state.loss_scale_counts["Dmain"].assign([0, 0, 25])
    assert state.nonfinite_message() == (
        "gradients of Dmain were not finite in float16 25 times in a row, at last at step 17"
    )
