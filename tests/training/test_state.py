"""The variables of a run: what there is, under which names, and where it starts."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.families.stylegan2.networks import Discriminator, Generator
from trainer.training import loss_scale
from trainer.training.state import PHASES, QUANTITIES, STATS, TrainState
from trainer.training.step import _PHASE_REPORTS


def networks() -> tuple[Generator, Discriminator]:
    sizes = {"c_dim": 0, "resolution": (8, 8), "channel_base": 64, "channel_max": 8}
    return Generator(z_dim=8, w_dim=8, mapping_layers=1, **sizes), Discriminator(**sizes)


def test_names_are_nvidias_and_all_different() -> None:
    g, d = networks()
    state = TrainState(g, d, seed=0)
    variables = state.variables()
    for prefix, specs in (("G", g.specs), ("D", d.specs), ("G_ema", g.specs)):
        for name, spec in specs.items():
            assert variables[f"{prefix}/{name}"].shape == spec.shape
    assert "G/synthesis.b8.conv0.weight" in variables
    # Each variable once, and nothing of the state is left out.
    assert len({id(variable) for variable in variables.values()}) == len(variables)
    held = [v for v in vars(state).values() if isinstance(v, tf.Variable)]
    held += [v for t in vars(state).values() if isinstance(t, dict) for v in t.values()]
    assert {id(variable) for variable in held} == {id(v) for v in variables.values()}


def test_moments_are_of_what_trains() -> None:
    g, d = networks()
    state = TrainState(g, d, seed=0, freeze_d=3)
    assert set(state.g_first) == set(state.g_second) == set(g.trainable_names())
    assert "mapping.w_avg" not in state.g_first
    assert set(state.d_first) == set(state.d_second) == set(d.trainable_names(3))
    assert set(state.d_first) < set(state.d)
    for table in (state.g_first, state.g_second, state.d_first, state.d_second):
        assert not any(np.any(variable.numpy()) for variable in table.values())


def test_where_a_run_starts() -> None:
    g, d = networks()
    state, again, other = (TrainState(g, d, seed=s, augment_p=0.25) for s in (4, 4, 5))
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
    state = TrainState(*networks(), seed=0, dtype=tf.float64)
    floats = {v.dtype for n, v in state.variables().items() if not v.dtype.is_integer}
    assert floats == {tf.float64}


@pytest.mark.parametrize("index", range(len(QUANTITIES)))
def test_message_of_a_nonfinite_quantity(index: int) -> None:
    state = TrainState(*networks(), seed=0)
    state.nonfinite.assign([17, index])
    phase, name = QUANTITIES[index]
    assert state.nonfinite_message() == f"{name} of {phase} is not finite at step 17"


def test_message_of_a_row_of_skipped_updates() -> None:
    """It is the phase's own row that counts, and its length."""
    state = TrainState(*networks(), seed=0)
    state.nonfinite.assign([17, QUANTITIES.index(("Dmain", "gradients"))])
    counts = np.zeros([len(PHASES), 3], np.int64)
    counts[PHASES.index("Gmain"), loss_scale.IN_A_ROW] = loss_scale.MAX_SKIPPED
    state.loss_scale_counts.assign(counts)
    assert state.nonfinite_message() == "gradients of Dmain is not finite at step 17"
    counts[PHASES.index("Dmain"), loss_scale.IN_A_ROW] = 25
    state.loss_scale_counts.assign(counts)
    assert state.nonfinite_message() == (
        "gradients of Dmain were not finite in float16 25 times in a row, at last at step 17"
    )


def test_all_that_is_named_is_reported() -> None:
    """The step looks these names up; every report has its place in the statistics."""
    reported = {name for names in _PHASE_REPORTS.values() for name in names}
    assert reported == set(STATS)
    for phase, name in QUANTITIES:
        assert name == "gradients" or name in _PHASE_REPORTS[phase]
    assert {phase for phase, _ in QUANTITIES} == set(_PHASE_REPORTS)
