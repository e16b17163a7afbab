"""Every family against every property that training, checkpoints and serving rely on.

A family that is added to the registry is tested here; nothing names one.
"""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import trainer
from tests.conformance.families import make
from tests.serving import test_model_card
from tests.training.test_step import Run, distance
from trainer import config as config_lib
from trainer.config import CheckpointConfig
from trainer.core.errors import ConfigError, UsageError
from trainer.data.manifest import Manifest
from trainer.families import registry
from trainer.generate import write_mixing_sheet
from trainer.serving import model_card, saved_model
from trainer.serving.rendering import Renderer
from trainer.serving.signatures import Served
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run")
every_family = pytest.mark.parametrize("family", registry.NAMES)
ROOT = pathlib.Path(__file__).parents[2]

_runs: dict[str, Run] = {}


def trained(family: str, manifest: Manifest) -> Run:
    """After two steps made op by op in float64."""
    if family not in _runs:
        tf.config.run_functions_eagerly(True)
        run = make(family, manifest)
        run.reports = run.steps(2)
        tf.config.run_functions_eagerly(False)
        _runs[family] = run
    return _runs[family]


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], limit: float) -> None:
    assert found.keys() == wanted.keys()
    apart = {name: distance(found[name], value) for name, value in wanted.items()}
    assert not {name: value for name, value in apart.items() if value > limit}


@every_family
def test_every_parameter_learns(family: str, squares: Manifest) -> None:
    run = trained(family, squares)
    for network in ("G", "D"):
        values, _, second, count = run.state.optimized(network)
        assert count.numpy() > 0
        names = run.step._networks.trainable_names(network)
        assert set(second) == set(names) <= set(values)
        # The second moment is that of all gradients so far.
        assert not [name for name in names if not np.any(second[name].numpy())]


@every_family
def test_freeze_d_takes_layer_after_layer(family: str, squares: Manifest) -> None:
    """Each layer with all of its parameters, never the head; more than there are is an error."""
    discriminator = trained(family, squares).step._networks.discriminator
    layers = discriminator.freezable_layers
    before = set(discriminator.trainable_names(0))
    for count, layer in enumerate(layers, 1):
        left = set(discriminator.trainable_names(count))
        frozen = before - left
        assert frozen == {name for name in before if name.startswith(f"{layer}.")} != set()
        before = left
    assert before
    with pytest.raises(ConfigError, match=rf"has {len(layers)} that can be frozen"):
        discriminator.trainable_names(len(layers) + 1)


@every_family
@pytest.mark.usefixtures("eagerly")
def test_two_rounds_are_one(family: str, squares: Manifest) -> None:
    halves = make(family, squares, rounds=2)
    halves.steps(2)
    assert_same(halves.values(), trained(family, squares).values(), 1e-9)


@every_family
@pytest.mark.slow
def test_two_replicas_are_one(family: str, squares: Manifest, tmp_path: pathlib.Path) -> None:
    """In another process: in one, TensorFlow would take collectives for those of another run."""
    out = tmp_path / "values.npz"
    module = "tests.conformance.families"
    command = [sys.executable, "-m", module, family, squares.directory, str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as arrays:
        assert_same(dict(arrays), trained(family, squares).values(), 1e-9)


@every_family
def test_a_graph_is_the_same(family: str, squares: Manifest) -> None:
    run = make(family, squares)
    reports = run.steps(2)
    assert_same(run.values(), trained(family, squares).values(), 1e-9)
    for report, wanted in zip(reports, trained(family, squares).reports, strict=True):
        tf.nest.map_structure(
            functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-12), report, wanted
        )


@every_family
@pytest.mark.slow
def test_xla_is_the_same(family: str, squares: Manifest) -> None:
    """Gradients and updates compiled, all draws being made outside."""
    run = make(family, squares, jit=True)
    run.steps(2)
    assert_same(run.values(), trained(family, squares).values(), 1e-8)


@every_family
@pytest.mark.usefixtures("eagerly")
def test_bfloat16_is_close(family: str, squares: Manifest) -> None:
    """The first losses, before what Adam makes of small differences."""
    full, half = make(family, squares), make(family, squares, precision="bfloat16")
    (wanted,), (found,) = full.steps(1), half.steps(1)
    assert half.state.nonfinite_message() is None
    assert {variable.dtype for variable in half.state.g.values()} == {tf.float32}
    for phase in ("Gmain", "Dmain"):
        loss = f"Loss/{phase[0]}/loss"
        assert found[phase][loss][1] == pytest.approx(wanted[phase][loss][1], rel=0.05)
        assert found[phase][loss][1] != wanted[phase][loss][1]


@every_family
@pytest.mark.usefixtures("eagerly")
def test_a_checkpoint_goes_on_bit_for_bit(
    family: str,
    squares: Manifest,
    tmp_path: pathlib.Path,
) -> None:
    run, other = make(family, squares), make(family, squares)
    run.steps(1)
    info = {"step": 1, "kimg": 0.008, "resolution": [8, 8], "channels": 3}
    saving = Checkpoints(str(tmp_path), CheckpointConfig(), run.state.variables())
    saving.save(1, info)
    saving.wait()
    restoring = Checkpoints(str(tmp_path), CheckpointConfig(), other.state.variables())
    assert not restoring.restore(checkpoint.find(str(tmp_path)))
    next(other.stream)  # what the first step read
    run.steps(1)
    other.steps(1)
    for name, value in run.values().items():
        np.testing.assert_array_equal(other.values()[name], value, err_msg=name)


def generator(family: str, manifest: Manifest) -> tuple[Any, dict[str, np.ndarray]]:
    run = trained(family, manifest)
    params = {name: value.numpy().astype(np.float32) for name, value in run.state.g_ema.items()}
    return run.step._networks.generator, params


@every_family
def test_an_image_does_not_depend_on_its_batch(family: str, squares: Manifest) -> None:
    network, params = generator(family, squares)
    seeds, labels = [3, 1, 4, 15], [0, 2, 1, 0]
    together = list(Renderer(network, params, batch=4).images(seeds, labels))
    alone = [
        next(Renderer(network, params, batch=1).images([s], [c]))
        for s, c in zip(seeds, labels, strict=True)
    ]
    for one, other in zip(together, alone, strict=True):
        assert one.shape == (8, 8, 3)
        assert np.max(np.abs(one.astype(int) - other)) <= 1
    assert len({image.tobytes() for image in together}) == 4
    # Of the same seed, but another class.
    other = next(Renderer(network, params).images([3], [1]))
    assert np.any(other != together[0])


@every_family
def test_truncation_or_why_not(family: str, squares: Manifest) -> None:
    network, params = generator(family, squares)
    if not network.truncates:
        with pytest.raises(UsageError, match="no average image"):
            Renderer(network, params).truncated(0.5)
        return
    images = Renderer(network, params).truncated(0.0).images([1, 2], [0, 0])
    np.testing.assert_array_equal(*images)


@every_family
def test_a_run_or_a_checkpoint_is_sampled(
    family: str, squares: Manifest, tmp_path: pathlib.Path
) -> None:
    run = trained(family, squares)
    info = {
        "kimg": 0.016,
        "config": config_lib.to_dict(run.config),
        "resolution": [8, 8],
        "channels": 3,
        "label_names": squares.label_names,
        "label_counts": squares.label_counts,
    }
    saving = Checkpoints(str(tmp_path), CheckpointConfig(), run.state.variables())
    saving.save(2, info)
    saving.wait()
    network, params = generator(family, squares)
    psi = 0.5 if network.truncates else 1.0
    wanted = list(Renderer(network, params).truncated(psi).images([5, 9], [1, 1]))
    for path in (tmp_path, tmp_path / "checkpoints" / "step-000000002"):
        loaded = trainer.load(path)
        assert (loaded.step, loaded.kimg, loaded.resolution) == (2, 0.016, (8, 8))
        assert loaded.labels == ("red", "green", "blue")
        found = loaded.sample([5, 9], label="green", truncation_psi=psi)
        assert np.max(np.abs(found.astype(int) - wanted)) <= 1


@every_family
def test_mixing_or_why_not(family: str, squares: Manifest, tmp_path: pathlib.Path) -> None:
    network, params = generator(family, squares)
    renderer = Renderer(network, params)
    if network.num_ws == 1:
        with pytest.raises(UsageError, match="no styles to mix"):
            write_mixing_sheet(renderer, [1], [2], None, 0, str(tmp_path))
        assert not list(tmp_path.iterdir())
        return
    assert pathlib.Path(write_mixing_sheet(renderer, [1], [2], None, 0, str(tmp_path))).exists()


@every_family
def test_a_saved_model_draws_the_same(
    family: str,
    squares: Manifest,
    tmp_path: pathlib.Path,
) -> None:
    network, params = generator(family, squares)
    served = Served(network, params)
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(served, str(tmp_path), signatures=served.signatures(), options=options)
    loaded: Any = tf.saved_model.load(str(tmp_path))
    given = {
        "seed": tf.constant([7], tf.int64),
        "truncation_psi": tf.constant([1.0]),
        "noise_mode": tf.constant(["const"]),
    }

    def signature(**inputs: Any) -> np.ndarray:
        images: np.ndarray = loaded.signatures["serving_default"](**{**given, **inputs})[
            "images"
        ].numpy()
        return images

    z = tf.constant(np.stack([np.random.RandomState(seed).randn(8) for seed in (5, 9)]), tf.float32)
    found = signature(z=z, label=tf.constant([2, 0], tf.int64))
    wanted = np.stack(list(Renderer(network, params).images([5, 9], [2, 0])))
    assert np.max(np.abs(found.astype(int) - wanted)) <= 1
    seeded = signature(z=tf.zeros([1, 0]), label=tf.constant([1], tf.int64))
    assert seeded.shape == (1, 8, 8, 3)
    facts = saved_model._facts(family, network, params)
    card = test_model_card.make(
        squares.label_counts, network=facts, signatures=saved_model._specs(served)
    )
    test_model_card.run_snippet(model_card.text(card), str(tmp_path))
    if not network.truncates:
        with pytest.raises(tf.errors.InvalidArgumentError, match="truncation_psi must be 1"):
            signature(z=z, label=tf.constant([2], tf.int64), truncation_psi=tf.constant([0.5]))
