"""Checkpoints are there whole or not at all, and a run never loses its last good one."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import tensorflow as tf

from tests.training.conftest import TINY_MODEL
from trainer import config as config_lib
from trainer.config import CheckpointConfig
from trainer.core import lease as lease_lib
from trainer.core import storage
from trainer.core.errors import CheckpointError, StorageError
from trainer.core.fencing import Record
from trainer.core.lease import Owner
from trainer.families.protocol import DataShape
from trainer.training import build, checkpoint
from trainer.training.checkpoint import Checkpoints, Inventory
from trainer.training.state import TrainState

ROOT = pathlib.Path(__file__).parents[2]
SHAPE = DataShape((8, 8), 3, (5, 3))


def make_config(**model: int) -> config_lib.Config:
    config = config_lib.from_dict({"model": {**TINY_MODEL, **model}, "data": {"use_labels": True}})
    return config_lib.resolve(config, resolution=SHAPE.resolution)


def make_state(seed: int = 0, objective: Any = (), training: Any = (), **model: int) -> TrainState:
    config = make_config(**model)
    config = dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, **dict(objective)),
        training=dataclasses.replace(config.training, **dict(training)),
    )
    networks, objective, _ = build.recipe(config, SHAPE)
    return TrainState(networks, objective, seed=seed)


def scrambled(seed: int = 7) -> TrainState:
    """A state in which no two variables hold the same."""
    state, rng = make_state(), np.random.default_rng(seed)
    for variable in state.variables().values():
        value = rng.standard_normal(variable.shape) * 100
        variable.assign(tf.cast(value, variable.dtype))
    return state


def info(kimg: float = 0.0) -> dict[str, Any]:
    return {
        "kimg": kimg,
        "config": config_lib.to_dict(make_config()),
        "resolution": list(SHAPE.resolution),
        "channels": SHAPE.channels,
        "label_counts": list(SHAPE.label_counts),
        "label_names": ["cat", "dog"],
    }


def small(workdir: pathlib.Path, **settings: int) -> Checkpoints:
    """Checkpoints of one number."""
    number = tf.Variable(1.5)
    return Checkpoints(str(workdir), CheckpointConfig(**settings), {"number": number})


def save(checkpoints: Checkpoints, step: int, info: dict[str, Any]) -> str:
    """Saves, waits until it is done, and returns where."""
    checkpoints.save(step, info)
    checkpoints.wait()
    return storage.join(checkpoints._workdir, "checkpoints", f"step-{step:09d}")


def file_of(path: str, name: str) -> pathlib.Path:
    """The file of a checkpoint by its name without the token."""
    first, dot, rest = name.partition(".")
    (found,) = pathlib.Path(path).glob(f"{first}-*{dot}{rest}")
    return found


def names(workdir: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def steps(workdir: pathlib.Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(workdir)]


# ------------------------------------------------------------------------------ round trip


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: pathlib.Path) -> None:
    state = scrambled()
    wanted = {name: variable.numpy() for name, variable in state.variables().items()}
    path = save(Checkpoints(str(tmp_path), CheckpointConfig(), state.variables()), 12, info(0.192))
    assert names(tmp_path) == ["step-000000012"]
    found, skipped = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert (found.path, found.step, found.info["kimg"], skipped) == (path, 12, 0.192, [])
    other = make_state(seed=1)
    Checkpoints(str(tmp_path), CheckpointConfig(), other.variables()).restore(found)
    for name, variable in other.variables().items():
        assert variable.numpy().tobytes() == wanted[name].tobytes(), name


def test_parameters_can_be_read_without_the_rest(tmp_path: pathlib.Path) -> None:
    state = scrambled()
    save(Checkpoints(str(tmp_path), CheckpointConfig(), state.variables()), 3, info())
    found = checkpoint.find(str(tmp_path))
    for prefix, table in (("G", state.g), ("D", state.d), ("G_ema", state.g_ema)):
        read = checkpoint.read_parameters(found, prefix)
        assert set(read) == set(table)
        for name, value in read.items():
            np.testing.assert_array_equal(value, table[name].numpy())


@pytest.mark.parametrize("name", ["", "checkpoints/step-000000003", "checkpoints/step-000000003/"])
def test_the_generator_of_a_run_or_a_checkpoint(tmp_path: pathlib.Path, name: str) -> None:
    state = scrambled()
    save(Checkpoints(str(tmp_path), CheckpointConfig(), state.variables()), 3, info(0.096))
    where = storage.join(str(tmp_path), name) if name else str(tmp_path)
    found = checkpoint.find(where)
    generator, params = checkpoint.load_generator(found)
    assert (generator.resolution, generator.c_dim, generator.z_dim) == ((8, 8), 2, 8)
    assert set(params) == set(state.g_ema)
    np.testing.assert_array_equal(params["mapping.w_avg"], state.g_ema["mapping.w_avg"].numpy())
    assert (found.step, found.info["kimg"]) == (3, 0.096)


# ------------------------------------------------------------------------------ damage


def shorten(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def corrupt(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80  # in text: no longer UTF-8
    path.write_bytes(bytes(content))


def with_a_marker_that_fits(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)
    (marker,) = path.parent.glob("COMMITTED-*")
    document = json.loads(marker.read_text())
    document["files"][path.name] = dataclasses.asdict(storage.digest(str(path)))
    marker.write_text(json.dumps(document))


DAMAGE: dict[str, tuple[str, Callable[[pathlib.Path], object], str]] = {
    "killed before the marker": ("COMMITTED", pathlib.Path.unlink, "never completed"),
    "a shard of values cut": ("state.data-00000-of-00001", shorten, "is not what was written"),
    "a flipped bit": ("state.data-00000-of-00001", corrupt, "is not what was written"),
    "an index lost": ("state.index", pathlib.Path.unlink, "state-.*.index is missing"),
    "counters cut": ("state.json", shorten, "state-.*.json is not what was written"),
    "counters lost": ("state.json", pathlib.Path.unlink, "state-.*.json is missing"),
    "a marker cut": ("COMMITTED", shorten, "COMMITTED-.* is damaged"),
    "a flipped bit in the marker": ("COMMITTED", corrupt, "COMMITTED-.* is damaged"),
    "an empty marker": ("COMMITTED", lambda p: p.write_bytes(b""), "COMMITTED-.* is damaged"),
    "a marker of nothing": (
        "COMMITTED",
        lambda p: p.write_text('{"format": 4, "files": {}}'),
        "state-.*.json is not",
    ),
    "a marker of another kind": ("COMMITTED", lambda p: p.write_text('{"files": 3}'), "is damaged"),
    "a marker of another format": (
        "COMMITTED",
        lambda p: p.write_text('{"format": 5, "files": {}}'),
        "it is of format 5, and this trainer reads format 4",
    ),
    "a marker a thousand deep": (
        "COMMITTED",
        lambda p: p.write_text("[" * 100_000 + "]" * 100_000),
        "is damaged",
    ),
    "counters of another kind": (
        "state.json",
        lambda p: with_a_marker_that_fits(p, b"[1]"),
        "it holds no JSON object",
    ),
    "counters a thousand deep": (
        "state.json",
        lambda p: with_a_marker_that_fits(p, b"[" * 100_000),
        "it is nested",
    ),
    "a marker that is a list": ("COMMITTED", lambda p: p.write_text("[1]"), "is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_does_not_exist(tmp_path: pathlib.Path, kind: str) -> None:
    checkpoints = small(tmp_path)
    good, bad = save(checkpoints, 10, info()), save(checkpoints, 20, info())
    name, damage, reason = DAMAGE[kind]
    damage(file_of(bad, name))
    found, skipped = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found.path == good
    assert len(skipped) == 1
    assert bad in skipped[0]
    assert re.search(reason, skipped[0])
    with pytest.raises(CheckpointError, match=reason) as caught:
        checkpoint.find(bad)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A workdir with checkpoints of steps 10 and 20."""
    workdir = tmp_path_factory.mktemp("two")
    checkpoints = small(workdir)
    for step in (10, 20):
        save(checkpoints, step, info(step))
    return workdir


FILES = ("COMMITTED", "state.json", "state.index", "state.data-00000-of-00001")


def assert_not_taken_for_whole(workdir: pathlib.Path) -> None:
    """Step 20 is damaged: it is passed over, or nothing of it that is used has changed."""
    found, skipped = checkpoint.newest(str(workdir))
    assert found is not None
    assert (found.step, len(skipped)) in {(10, 1), (20, 0)}
    assert found.info == info(found.step)
    number = tf.Variable(0.0)
    Checkpoints(str(workdir), CheckpointConfig(), {"number": number}).restore(found)
    assert number.numpy() == 1.5
    if skipped:
        assert re.search(r"never completed|missing|damaged|is not|of format", skipped[0])
        assert "\n" not in skipped[0]


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    name=hypothesis.strategies.sampled_from(FILES),
    where=hypothesis.strategies.floats(0, 1, exclude_max=True),
    kind=hypothesis.strategies.sampled_from(["cut", "flip", "other", "insert", "lose", "append"]),
    bits=hypothesis.strategies.integers(1, 255),
)
def test_any_damage_to_any_file_is_found(
    two: pathlib.Path, name: str, where: float, kind: str, bits: int
) -> None:
    path = file_of(str(two / "checkpoints" / "step-000000020"), name)
    before = path.read_bytes()
    place, other = int(where * len(before)), bytes([bits])
    after = {
        "cut": before[:place],
        "flip": before[:place] + bytes([before[place] ^ bits]) + before[place + 1 :],
        "other": before[:place] + other + before[place + 1 :],
        "insert": before[:place] + other + before[place:],
        "lose": before[:place] + before[place + 1 :],
        "append": before + other,
    }[kind]
    try:
        path.write_bytes(after)
        assert_not_taken_for_whole(two)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", FILES)
def test_a_file_torn_at_any_byte_is_found(two: pathlib.Path, name: str) -> None:
    path = file_of(str(two / "checkpoints" / "step-000000020"), name)
    before = path.read_bytes()
    try:
        for length in range(0, len(before), 1 if len(before) < 500 else 7):
            path.write_bytes(before[:length])
            found, skipped = checkpoint.newest(str(two))
            assert found is not None
            assert (found.step, len(skipped)) == (10, 1), length
    finally:
        path.write_bytes(before)


def test_a_file_too_many_is_no_damage(tmp_path: pathlib.Path) -> None:
    path = save(small(tmp_path), 10, info())
    pathlib.Path(path, "notes.txt").write_text("the good one")
    found, skipped = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert skipped == []


def test_strangers_beside_the_checkpoints(tmp_path: pathlib.Path) -> None:
    save(small(tmp_path), 10, info())
    for name in ("step-20", "best", "step-000000030.tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    found, skipped = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert (found.step, skipped) == (10, [])


def test_steps_are_ordered_as_numbers(tmp_path: pathlib.Path) -> None:
    checkpoints = small(tmp_path, keep_last=2)
    for step in (5, 999_999_999, 1_000_000_000):
        save(checkpoints, step, info())
    assert set(steps(tmp_path)) == {999_999_999, 1_000_000_000}
    found, _ = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found.step == 1_000_000_000


def test_what_a_dead_job_has_not_completed_goes(tmp_path: pathlib.Path) -> None:
    """And only that: not what it had completed, nor what is of nobody, nor of a job that isn't dead."""
    before = small(tmp_path)
    dead, unknown = before._names.token, "e" * 16
    folder = tmp_path / "checkpoints" / "step-000000020"
    save(before, 10, info())
    folder.mkdir()
    left = [
        f"state-{dead}.json",
        f"state-{dead}.data-00000-of-00001",
        f"state-{dead}.index.tempstate123",
        f".COMMITTED-{dead}.0a1b2c3d.tmp",
    ]
    others = ["notes.txt", "state.txt", f"state-{unknown}.json", f"mystate-{dead}.json"]
    for name in left + others:
        (folder / name).write_text("half")
    (tmp_path / "lease.json").write_bytes(
        lease_lib._document(
            dataclasses.replace(Owner.this_process(), token=dead, pid=2**22 + 1), 1, Record()
        )
    )
    with lease_lib.acquire(str(tmp_path), keeps_record=True, log=lambda _: None) as lease:
        inventory = Inventory(str(tmp_path), record=lease.record)
        lease.settle(inventory.last_steps(lease.record.pending))
        inventory.record = lease.record
        found, skipped = inventory.newest()
        assert found is not None and found.step == 10
        assert len(skipped) == 2 and all("never completed" in line for line in skipped)
        checkpoints = Checkpoints(
            str(tmp_path),
            CheckpointConfig(),
            {"number": tf.Variable(1.5)},
            inventory=inventory,
            lease=lease,
        )
        save(checkpoints, 20, info())
    assert steps(tmp_path) == [10, 20]
    kept = {path.name for path in folder.iterdir()}
    assert set(others) < kept
    assert {name for name in kept if lease.token in name} == kept - set(others)


# ------------------------------------------------------------------------------ which are kept


def test_the_last_few_are_kept(tmp_path: pathlib.Path) -> None:
    checkpoints = small(tmp_path, keep_last=2)
    for step in (10, 20, 30):
        save(checkpoints, step, info())
    assert steps(tmp_path) == [20, 30]


def test_one_for_each_period_is_kept(tmp_path: pathlib.Path) -> None:
    checkpoints = small(tmp_path, keep_last=1, keep_every_kimg=10)
    for step, kimg in ((1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (6, 24), (7, 36)):
        save(checkpoints, step, info(kimg))
    # The first at or after 10, 20 and 30 thousand; the last is also the newest.
    assert steps(tmp_path) == [3, 5, 7]


@pytest.mark.parametrize("damage", [("COMMITTED", pathlib.Path.unlink), ("state.json", corrupt)])
def test_damaged_ones_do_not_displace_good_ones(
    tmp_path: pathlib.Path, damage: tuple[str, Callable[[pathlib.Path], object]]
) -> None:
    checkpoints = small(tmp_path, keep_last=1, keep_every_kimg=100)
    save(checkpoints, 10, info())
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "kept")
    bad = save(checkpoints, 30, info())
    shutil.copytree(tmp_path / "kept", tmp_path / "checkpoints", dirs_exist_ok=True)
    damage[1](file_of(bad, damage[0]))
    found, _ = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found.step == 10
    # The run goes on from 10 and comes to 25, before where the damaged one is, and past it.
    save(small(tmp_path, keep_last=1, keep_every_kimg=100), 25, info())
    assert steps(tmp_path) == [25, 30]
    save(small(tmp_path, keep_last=1, keep_every_kimg=100), 35, info())
    assert steps(tmp_path) == [30, 35]  # it may be restored from elsewhere
    found, skipped = checkpoint.newest(str(tmp_path))
    assert found is not None and (found.step, skipped) == (35, [])


@pytest.mark.parametrize("period", [0, 10])
def test_a_whole_one_goes_only_for_whole_ones(tmp_path: pathlib.Path, period: int) -> None:
    """Older ones are looked at before they stand for the one that goes."""
    before = small(tmp_path, keep_last=9)
    paths = {step: save(before, step, info(step)) for step in (10, 13, 16, 20, 23, 26)}
    for step in (13, 20, 23):
        corrupt(file_of(paths[step], "state.json"))
    # A new start goes on from 26; of the others it doesn't know.
    save(small(tmp_path, keep_last=2, keep_every_kimg=period), 30, info(30))
    # Of the twenties, 26 is the first that is whole, and of the tens 10.
    assert steps(tmp_path) == sorted({13, 20, 23, 26, 30} | ({10} if period else set()))
    save(small(tmp_path, keep_last=2, keep_every_kimg=period), 33, info(33))
    assert steps(tmp_path) == sorted({13, 20, 23, 30, 33} | ({10, 26} if period else set()))


def test_checkpoints_of_format_1_are_refused(tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(save(small(tmp_path, keep_last=1), 10, info()))
    for file in path.iterdir():
        file.rename(path / re.sub("-[0-9a-f]{16}", "", file.name))
    with pytest.raises(
        CheckpointError, match=r"it is of format 1, and this trainer reads format 4"
    ):
        checkpoint.find(str(tmp_path))
    save(small(tmp_path, keep_last=1), 20, info())
    assert steps(tmp_path) == [10, 20]


def test_damaged_counters_do_not_stop_a_run(tmp_path: pathlib.Path) -> None:
    checkpoints = small(tmp_path, keep_last=2, keep_every_kimg=1)
    corrupt(file_of(save(checkpoints, 10, info(5)), "state.json"))
    save(checkpoints, 20, info(6))
    assert steps(tmp_path) == [10, 20]


# ------------------------------------------------------------------------------ failures


def test_of_other_networks(tmp_path: pathlib.Path) -> None:
    save(Checkpoints(str(tmp_path), CheckpointConfig(), make_state().variables()), 1, info())
    other = make_state(channel_max=4)
    before = {name: variable.numpy() for name, variable in other.variables().items()}
    checkpoints = Checkpoints(str(tmp_path), CheckpointConfig(), other.variables())
    with pytest.raises(CheckpointError, match="is of other networks") as caught:
        checkpoints.restore(checkpoint.find(str(tmp_path)))
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "G/synthesis.b4.const is [4, 4, 8], not [4, 4, 4]" in message
    assert "more" in message
    for name, variable in other.variables().items():
        np.testing.assert_array_equal(variable.numpy(), before[name])


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ({}, {}, []),
        (
            {"objective": {"pl_weight": 0.0}},
            {},
            [
                "starting afresh: objective/pl_mean, stats/Loss/pl_penalty, stats/Loss/G/reg, "
                "loss_scale/value/Greg, loss_scale/counts/Greg"
            ],
        ),
        (
            {},
            {"objective": {"r1_gamma": 0.0}},
            [
                "left behind: loss_scale/counts/Dreg, loss_scale/value/Dreg, stats/Loss/D/reg, "
                "stats/Loss/r1_penalty"
            ],
        ),
        (
            {"training": {"freeze_d": 1}},
            {},
            [
                "starting afresh: D_opt/first/b8.fromrgb.weight, D_opt/first/b8.fromrgb.bias, "
                "D_opt/second/b8.fromrgb.weight, D_opt/second/b8.fromrgb.bias"
            ],
        ),
        (
            {},
            {"training": {"freeze_d": 1}},
            [
                "left behind: D_opt/first/b8.fromrgb.bias, D_opt/first/b8.fromrgb.weight, "
                "D_opt/second/b8.fromrgb.bias, D_opt/second/b8.fromrgb.weight"
            ],
        ),
    ],
)
def test_of_another_objective(
    tmp_path: pathlib.Path, before: Any, after: Any, changes: list[str]
) -> None:
    """What both have goes on, and the rest is named."""
    old, new = make_state(**before), make_state(seed=1, **after)
    start = {name: variable.numpy() for name, variable in new.variables().items()}
    for variable in old.variables().values():
        variable.assign(tf.ones_like(variable))
    save(Checkpoints(str(tmp_path), CheckpointConfig(), old.variables()), 1, info())
    checkpoints = Checkpoints(
        str(tmp_path), CheckpointConfig(), new.variables(), optional=new.optional()
    )
    assert checkpoints.restore(checkpoint.find(str(tmp_path))) == changes
    for name, variable in new.variables().items():
        wanted = tf.ones_like(variable) if name in old.variables() else start[name]
        np.testing.assert_array_equal(variable.numpy(), wanted, err_msg=name)


def test_what_was_trained_must_be_in_it(tmp_path: pathlib.Path) -> None:
    state = make_state()
    variables = {n: v for n, v in state.variables().items() if n != "G/synthesis.b4.const"}
    save(Checkpoints(str(tmp_path), CheckpointConfig(), variables), 1, info())
    checkpoints = Checkpoints(
        str(tmp_path), CheckpointConfig(), state.variables(), optional=state.optional()
    )
    with pytest.raises(CheckpointError, match="of other networks: G/synthesis.b4.const is not in"):
        checkpoints.restore(checkpoint.find(str(tmp_path)))
    fewer = Checkpoints(str(tmp_path), CheckpointConfig(), {"G_opt/count": state.g_count})
    with pytest.raises(CheckpointError, match=r"G/\S+ is only in it"):
        fewer.restore(checkpoint.find(str(tmp_path)))


def test_with_variables_missing(tmp_path: pathlib.Path) -> None:
    save(small(tmp_path), 1, info())
    checkpoints = Checkpoints(
        str(tmp_path), CheckpointConfig(), {"number": tf.Variable(0.0), "G/x.y": tf.Variable(0.0)}
    )
    with pytest.raises(CheckpointError, match="G/x.y is not in it"):
        checkpoints.restore(checkpoint.find(str(tmp_path)))


def test_find_says_what_is_missing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="it holds none; give the --workdir"):
        checkpoint.find(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint.find(str(tmp_path / "checkpoints" / "step-000000007"))
    bad = save(small(tmp_path), 9, info())
    file_of(bad, "COMMITTED").unlink()
    with pytest.raises(CheckpointError, match="step-000000009: it was never completed"):
        checkpoint.find(str(tmp_path))


@pytest.mark.parametrize("file", ["state.json", "COMMITTED"])
def test_a_failed_save_leaves_nothing_of_itself(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    checkpoints = small(tmp_path, keep_last=1)
    good = save(checkpoints, 10, info())
    write = storage.write_text_atomic

    first, dot, rest = file.partition(".")

    def full(path: str, *args: Any) -> None:
        if re.search(rf"step-000000020/{first}-[0-9a-f]{{16}}{dot}{rest}$", path):
            raise StorageError(f"cannot write {path}: the disk is full")
        write(path, *args)

    monkeypatch.setattr(storage, "write_text_atomic", full)
    with pytest.raises(CheckpointError, match="disk is full.*goes on from the checkpoint before"):
        save(checkpoints, 20, info())
    assert names(tmp_path) == ["step-000000010"]
    assert checkpoint.find(str(tmp_path)).path == good


# Files may not grow past this, as on a full disk; TensorFlow writes, so it is a real one.
LIMITED = """
import resource, sys
import tensorflow as tf
from trainer.config import CheckpointConfig
from trainer.core.errors import CheckpointError
from trainer.core import lease as lease_lib
from trainer.core.fencing import Record
from trainer.core.lease import Owner
from trainer.training.checkpoint import Checkpoints, Inventory

values = tf.Variable(tf.random.stateless_uniform([1 << 16], [1, 2]))
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep_last=1), {"values": values})
checkpoints.save(10, {"kimg": 1.0})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
try:
    checkpoints.save(20, {"kimg": 2.0})
    checkpoints.wait()
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_while_values_are_written(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    assert "step-000000020 could not be written" in lines[0]
    assert names(tmp_path) == ["step-000000010"]
    assert checkpoint.find(str(tmp_path)).step == 10


def test_a_workdir_below_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="a part of the path is a file"):
        save(small(tmp_path / "file"), 1, info())


def test_the_marker_is_written_last(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seen = storage.write_text_atomic, {}

    def spy(path: str, text: str, *args: Any) -> None:
        if "/COMMITTED" in path:
            seen.update(json.loads(text)["files"])
            assert set(seen) == {p.name for p in pathlib.Path(path).parent.iterdir()}
        write(path, text, *args)

    monkeypatch.setattr(storage, "write_text_atomic", spy)
    save(small(tmp_path), 1, info())
    kinds = {re.sub("-[0-9a-f]{16}", "", name) for name in seen}
    assert kinds == {"state.json", "state.index", "state.data-00000-of-00001"}
