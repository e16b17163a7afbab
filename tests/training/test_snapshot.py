"""The grids of a run: the same tiles from its start to its end."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.core.errors import DataError
from trainer.data import manifest, shards
from trainer.data.manifest import Manifest
from trainer.families.stylegan2.networks import Generator
from trainer.telemetry import images
from trainer.telemetry.images import GridLayout
from trainer.training import snapshot
from trainer.training.snapshot import Snapshots

COLUMNS, ROWS = 3, 6  # 18 tiles: a whole batch of 16 and a part of one


@pytest.fixture(autouse=True)
def _small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of 256 tiles shows no more than one of 18."""
    monkeypatch.setattr(images, "grid_size", lambda resolution: (COLUMNS, ROWS))


def generator(c_dim: int = 0) -> tuple[Generator, dict[str, Any]]:
    network = Generator(
        z_dim=8,
        c_dim=c_dim,
        w_dim=8,
        resolution=(8, 8),
        mapping_layers=1,
        channel_base=64,
        channel_max=8,
    )
    return network, {name: tf.Variable(value) for name, value in network.init(seed=1).items()}


def tiles(grid: np.ndarray) -> np.ndarray:
    """[rows * H, columns * W, C] -> [tiles, H, W, C]."""
    parts = grid.reshape(ROWS, 8, COLUMNS, 8, 3).transpose(0, 2, 1, 3, 4)
    return parts.reshape(-1, 8, 8, 3)


def test_fakes_are_those_of_their_latents(squares: Manifest) -> None:
    """Every tile, those of the last and partial batch too."""
    network, params = generator()
    shots = Snapshots(network, squares, use_labels=False, seed=3)
    grid = shots.fakes(params)
    assert (grid.shape, grid.dtype) == ((ROWS * 8, COLUMNS * 8, 3), np.uint8)
    z = tf.constant(shots._z)
    assert z.shape == [COLUMNS * ROWS, 8]
    values = {name: tf.convert_to_tensor(value) for name, value in params.items()}
    wanted = network.synthesis(values, network.mapping(values, z, tf.zeros([len(z), 0])))
    difference = tiles(grid).astype(int) - images.to_uint8(wanted.numpy()).astype(int)
    assert np.abs(difference).max() <= 1
    assert len(np.unique(tiles(grid), axis=0)) == COLUMNS * ROWS


def test_latents_are_fixed_by_the_seed(squares: Manifest) -> None:
    network, params = generator()
    first, again = (Snapshots(network, squares, use_labels=False, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.fakes(params), again.fakes(params))
    np.testing.assert_array_equal(first.fakes(params), first.fakes(params))
    other = Snapshots(network, squares, use_labels=False, seed=4)
    assert np.any(other.fakes(params) != first.fakes(params))


def test_fakes_show_the_parameters_as_they_are_now(squares: Manifest) -> None:
    network, params = generator()
    shots = Snapshots(network, squares, use_labels=False, seed=3)
    before = shots.fakes(params)
    params["synthesis.b8.torgb.bias"].assign([5.0, 5.0, 5.0])
    assert np.mean(shots.fakes(params)) > np.mean(before) + 50


def test_a_row_for_each_class(squares: Manifest) -> None:
    network, params = generator(c_dim=3)
    shots = Snapshots(network, squares, use_labels=True, seed=3)
    np.testing.assert_array_equal(shots.layout.labels, np.repeat([0, 1, 2, 0, 1, 2], COLUMNS))
    np.testing.assert_array_equal(np.argmax(shots._c, axis=1), shots.layout.labels)
    assert shots._c.sum() == COLUMNS * ROWS
    # The class is the brightest colour of these reals.
    peaks = tiles(shots.reals()).reshape(COLUMNS * ROWS, -1, 3).max(axis=1)
    np.testing.assert_array_equal(np.argmax(peaks, axis=1), shots.layout.labels)
    shots.fakes(params)


def test_reals_are_those_of_the_layout(squares: Manifest) -> None:
    shots = Snapshots(generator()[0], squares, use_labels=False, seed=3)
    assert isinstance(shots.layout, GridLayout)
    wanted, _ = shards.read_images(squares, shots.layout.indices)
    np.testing.assert_array_equal(tiles(shots.reals()), wanted)


def test_variety_of_reals_is_1_and_that_of_one_image_0(
    squares: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fakes are compared within the class of their row, and no record is read a second time."""
    shots = Snapshots(generator(c_dim=3)[0], squares, use_labels=True, seed=3)
    resumed = Snapshots(generator(c_dim=3)[0], squares, use_labels=True, seed=3)
    reals = shots.reals()
    faded = (128 + (reals.astype(float) - 128) / 2).astype(np.uint8)
    assert resumed.variety(faded) == shots.variety(faded) == pytest.approx(0.5, abs=0.01)
    monkeypatch.setattr(shards, "read_images", None)
    assert shots.variety(reals) == resumed.variety(reals) == 1
    one_for_each_class = np.concatenate(
        [tiles(reals)[labels == shots.layout.labels][:1] for labels in shots.layout.labels]
    )
    assert shots.variety(images.tile(one_for_each_class, shots.layout.size)) == 0


def test_variety_of_fakes_is_what_their_latents_change(squares: Manifest) -> None:
    network, params = generator()
    shots = Snapshots(network, squares, use_labels=False, seed=3)
    before = shots.variety(shots.fakes(params))
    assert before > 0.01
    for name, value in params.items():
        if name.endswith("affine.weight"):
            value.assign(tf.zeros_like(value))
    assert shots.variety(shots.fakes(params)) == 0


def test_a_data_set_without_variety_has_no_measure(
    squares: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    shots = Snapshots(generator()[0], squares, use_labels=False, seed=3)
    monkeypatch.setattr(
        shards, "read_images", lambda *_: (np.zeros([COLUMNS * ROWS, 8, 8, 3], np.uint8), None)
    )
    assert np.isnan(shots.variety(np.zeros([ROWS * 8, COLUMNS * 8, 3], np.uint8)))


def test_a_damaged_record_leaves_the_grids_of_a_resumed_run(
    squares: Manifest, tmp_path: pathlib.Path
) -> None:
    """The tiles that it does not show stay, and rows keep their classes."""
    sound = Snapshots(generator(c_dim=3)[0], squares, use_labels=True, seed=3)
    shutil.copytree(squares.directory, tmp_path / "set")
    data = manifest.load(str(tmp_path / "set"))
    path = pathlib.Path(data.path(0))
    content = bytearray(path.read_bytes())
    content[40] ^= 1  # in the payload of record 0
    path.write_bytes(content)
    told: list[str] = []
    grids = []
    for _ in range(2):
        bad_records = shards.BadRecords(data, 1, told.append)
        shots = Snapshots(
            generator(c_dim=3)[0], data, use_labels=True, seed=3, bad_records=bad_records
        )
        grids.append(shots.reals())
        np.testing.assert_array_equal(shots.layout.labels, sound.layout.labels)
    np.testing.assert_array_equal(grids[0], grids[1])
    peaks = tiles(grids[0]).reshape(COLUMNS * ROWS, -1, 3).max(axis=1)
    np.testing.assert_array_equal(np.argmax(peaks, axis=1), sound.layout.labels)
    assert len(told) == 2 and all("record 0 of shard squares-00000" in line for line in told)
    with pytest.raises(DataError, match="record 0 of shard .*data.max_bad_records"):
        Snapshots(generator(c_dim=3)[0], data, use_labels=True, seed=3)


def test_batches_are_all_of_one_size(squares: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the graph is traced once, whatever the number of tiles."""
    network, params = generator()
    shots = Snapshots(network, squares, use_labels=False, seed=3)
    sizes = []
    draw = shots._draw

    def spy(values: Any, z: tf.Tensor, c: tf.Tensor) -> tf.Tensor:
        sizes.append(len(z))
        return draw(values, z, c)

    monkeypatch.setattr(shots, "_draw", spy)
    shots.fakes(params)
    assert sizes == [snapshot._BATCH] * 2
