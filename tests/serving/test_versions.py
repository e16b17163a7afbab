"""Versions are there completely or not at all, wherever an export is killed."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from tests.gcs.fixture import Gcs
from trainer.core import lease as lease_lib
from trainer.core import storage
from trainer.core.errors import StorageError
from trainer.core.lease import LeaseHeldError, LeaseLostError
from trainer.serving import versions

ROOT = pathlib.Path(__file__).parents[2]
FILES = {
    "model_card.json": b"",  # says what the others are
    "saved_model.pb": b"graph",
    "fingerprint.pb": b"print",
    "variables/variables.index": b"index",
    "variables/variables.data-00000-of-00001": bytes(100_000),
}


def write(folder: str, mark: str = "") -> None:
    """What stands for a SavedModel."""
    content = {name: data + mark.encode() for name, data in FILES.items()}
    content["model_card.json"] = json.dumps(
        {n: len(d) for n, d in content.items() if n[0] != "m"}
    ).encode()
    for name, data in content.items():
        storage.write_bytes_atomic(storage.join(folder, name), data)


def publish(dest: str, mark: str = "") -> versions.Draft:
    with versions.draft(dest, scratch=tempfile.TemporaryDirectory, log=lambda _: None) as draft:
        write(draft.folder, mark)
    return draft


def loadable(dest: str) -> list[int]:
    """The versions a loader takes; each must be complete."""
    files = storage.walk(dest)
    found = sorted(
        int(n.split("/")[0]) for n in files if n.endswith("/saved_model.pb") and n[0] != "."
    )
    for number in found:
        card = storage.join(dest, str(number), "model_card.json")
        wanted = json.loads(storage.read_bytes(card))
        for name, size in wanted.items():
            assert files[f"{number}/{name}"].bytes == size, f"{number}/{name}"
        assert len(wanted) == len(FILES) - 1
    return found


def tops(dest: str) -> set[str]:
    return {name.partition("/")[0] for name in storage.walk(dest)}


@pytest.fixture(params=["local", "memory", "gcs"])
def dest(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
    if request.param == "local":
        return str(tmp_path / "model")
    if request.param == "memory":
        return f"memory://{tmp_path.name}/model"
    return f"{request.getfixturevalue('gcs').url}/model"


# ------------------------------------------------------------------------------ publishing


def test_versions_are_numbered_and_complete(dest: str) -> None:
    paths = [publish(dest).path for _ in range(3)]
    assert paths == [storage.join(dest, str(number)) for number in (1, 2, 3)]
    assert loadable(dest) == [1, 2, 3]
    assert tops(dest) == {"1", "2", "3"}  # no lease, nothing half done


def test_the_number_follows_the_largest(dest: str) -> None:
    storage.write_bytes_atomic(storage.join(dest, "20231101", "saved_model.pb"), b"theirs")
    storage.write_bytes_atomic(storage.join(dest, "x99", "saved_model.pb"), b"no number")
    assert publish(dest).number == 20231102
    assert storage.read_bytes(storage.join(dest, "20231101", "saved_model.pb")) == b"theirs"


def test_nothing_is_there_before_the_block_ends(dest: str) -> None:
    with versions.draft(dest, scratch=tempfile.TemporaryDirectory) as draft:
        write(draft.folder)
        assert loadable(dest) == []
        assert not any(name.isdigit() for name in tops(dest))


def test_a_failure_leaves_nothing(dest: str) -> None:
    publish(dest)

    def failing() -> None:
        with versions.draft(dest, scratch=tempfile.TemporaryDirectory) as draft:
            write(draft.folder)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert tops(dest) == {"1"}


def test_two_exports_exclude_each_other(dest: str) -> None:
    with versions.draft(dest, scratch=tempfile.TemporaryDirectory) as draft:
        write(draft.folder)
        with pytest.raises(LeaseHeldError, match=r"in use by .*process") as caught:
            publish(dest)
    assert "\n" not in str(caught.value)
    assert loadable(dest) == [1]


def test_who_lost_the_lease_publishes_nothing(dest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: object) -> None:
        raise LeaseLostError("lost")

    monkeypatch.setattr(lease_lib.Lease, "check", lost)
    with pytest.raises(LeaseLostError):
        publish(dest)
    assert loadable(dest) == []
    assert not any(name.isdigit() for name in tops(dest))
    monkeypatch.undo()
    publish(dest)
    assert tops(dest) == {"1"}  # and what it left is gone


def test_foreign_directories_are_not_touched(dest: str) -> None:
    """Not even a number without a SavedModel, if no export has made it."""
    kept = ["7/data.csv", ".cache.partial/x", "notes/1/readme", "8/saved_model.pbtxt"]
    for name in kept:
        storage.write_bytes_atomic(storage.join(dest, name), b"theirs")
    assert publish(dest).number == 9
    assert set(kept) < set(storage.walk(dest))


# ------------------------------------------------------------------------------ object stores


def test_saved_model_comes_last_and_the_card_first(gcs: Gcs) -> None:
    publish(f"{gcs.url}/model")
    copied = [request.object for request in gcs.emulator.log() if request.kind == "copy"]
    objects = [name.partition(".partial/")[2] for name in copied]
    assert objects[0] == "model_card.json"
    assert objects[-1] == "saved_model.pb"
    assert set(objects) == set(FILES)


def test_an_upload_that_arrives_changed_is_not_published(
    gcs: Gcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = storage.upload

    def damaged(local: str, path: str) -> None:
        upload(local, path)
        if path.endswith("variables.index"):
            storage.write_bytes_atomic(path, b"indeX")

    monkeypatch.setattr(storage, "upload", damaged)
    with pytest.raises(StorageError, match=r"variables\.index is not in the store") as caught:
        publish(f"{gcs.url}/model")
    assert "\n" not in str(caught.value)
    assert storage.walk(f"{gcs.url}/model") == {}


def test_a_store_that_stops_taking_files(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the moves: what was moved is removed, so that nothing is left."""
    rename, moved = storage.rename, []

    def failing(source: str, target: str) -> None:
        if len(moved) == 3:
            raise StorageError("cannot write: no more")
        moved.append(target)
        rename(source, target)

    monkeypatch.setattr(storage, "rename", failing)
    with pytest.raises(StorageError, match="no more"):
        publish(f"{gcs.url}/model")
    assert storage.walk(f"{gcs.url}/model") == {}


# ------------------------------------------------------------------------------ killed

# Publishes in child processes, each of which kills itself before its n-th request to the store, or
# its n-th use of the disk, with n up to the last there is. TensorFlow isn't imported, so forking is
# safe.
KILLER = """
import os, signal, sys
from tests.serving import test_versions as tests
from trainer.core import storage

dest, stride = sys.argv[1], int(sys.argv[2])
if dest.startswith("gs://"):
    from trainer.core import cloud_requests as store
    names = ["tried"]
else:
    store, names = storage, ["walk", "makedirs", "remove_tree", "write_bytes_atomic", "sync",
                             "rename", "write_version", "remove_version", "_version"]

def child(at):
    calls = 0
    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in names:
        setattr(store, name, counted(getattr(store, name)))
    tests.publish(dest, str(at))
    os._exit(0)

kills, before = 0, []
while True:
    pid = os.fork()
    if pid == 0:
        child(kills * stride + 1)
    if os.waitpid(pid, 0)[1] == 0:
        break
    kills += 1
    now = tests.loadable(dest)
    assert now[: len(before)] == before and len(now) <= len(before) + 1, (before, now)
    before = now
assert tests.loadable(dest)[:-1] == before
# Only what was complete is left, under numbers that rise.
assert tests.tops(dest) == {str(number) for number in tests.loadable(dest)}, tests.tops(dest)
print(kills, len(before))
"""


def kills(dest: str, environment: dict[str, str], stride: int = 1) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, dest, str(stride)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    count, survived = map(int, done.stdout.split()[-2:])
    return count, survived


def test_killed_anywhere_on_a_disk(tmp_path: pathlib.Path) -> None:
    count, survived = kills(str(tmp_path / "model"), dict(os.environ))
    assert count >= 20
    assert 1 <= survived < count  # killed after the rename, it is there


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.proof)])
def test_killed_anywhere_in_a_store(gcs: Gcs, stride: int) -> None:
    count, survived = kills(f"{gcs.url}/model", gcs.environment(), stride)
    assert count * stride >= 40
    assert 1 <= survived < count, (count, survived)


def test_a_number_that_was_seen_is_not_used_again(gcs: Gcs) -> None:
    """A server that has tried it in vain might never look at it again."""
    dest = f"{gcs.url}/model"
    for name in ("2/model_card.json", "2/variables/variables.index", ".3.0123abcd.partial/x"):
        storage.write_bytes_atomic(storage.join(dest, name), b"{}")
    assert publish(dest).number == 3
    assert tops(dest) == {"3"}
