"""Paths, atomic writes and error messages, on the disk, on Cloud Storage and behind fsspec."""

from __future__ import annotations

import errno
import os
import pathlib
import sys
from collections.abc import Iterator
from concurrent import futures

import fsspec
import pytest

from tests.gcs.fixture import Gcs
from trainer.core import cloud_requests, storage
from trainer.core.errors import CheckpointError, StorageError


@pytest.fixture(params=["local", "gs", "fsspec"])
def root(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path)
        return
    if request.param == "gs":
        yield f"{request.getfixturevalue('gcs').url}/run"
        return
    yield "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def test_write_read_list_remove(root: str) -> None:
    path = storage.join(root, "a", "b.txt")
    assert not storage.exists(path)
    storage.write_text_atomic(path, "snow \u2603\n")
    storage.write_bytes_atomic(storage.join(root, "a", "c.bin"), b"\0\1")
    assert storage.read_text(path) == "snow \u2603\n"
    assert storage.read_bytes(storage.join(root, "a", "c.bin")) == b"\0\1"
    assert storage.size(path) == 9
    assert storage.listdir(storage.join(root, "a")) == ["b.txt", "c.bin"]
    assert storage.isdir(storage.join(root, "a"))
    assert not storage.isdir(path)
    assert storage.isfile(path)
    assert not storage.isfile(storage.join(root, "a"))
    assert storage.exists(storage.join(root, "a"))
    found = storage.walk(root)
    assert {name: digest.bytes for name, digest in found.items()} == {"a/b.txt": 9, "a/c.bin": 2}
    assert storage.walk(storage.join(root, "none")) == {}
    storage.remove_tree(path)
    assert storage.listdir(storage.join(root, "a")) == ["c.bin"]
    storage.remove_tree(storage.join(root, "a"))
    storage.remove_tree(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a"))


def test_walk_passes_over_what_vanishes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker that looks while the chief renames its lease into place."""
    for name in ("a", "lease.json.tmp", "z"):
        (tmp_path / name).write_text(name)
    walked = list(os.walk(tmp_path))
    monkeypatch.setattr(os, "walk", lambda _: walked)
    (tmp_path / "lease.json.tmp").unlink()
    assert sorted(storage.walk(str(tmp_path))) == ["a", "z"]


def test_write_replaces_and_append_adds(root: str) -> None:
    path = storage.join(root, "log.jsonl")
    file = storage.AppendedFile(path, b"1\n", None)
    file.add(b"2\n")
    file.add("\u2603\n".encode())
    file.flush()
    assert storage.read_text(path) == "1\n2\n\u2603\n"
    assert storage.listdir(root) == ["log.jsonl"]
    storage.write_text_atomic(path, "3\n")
    assert storage.read_text(path) == "3\n"


def test_open_read_seeks(root: str) -> None:
    path = storage.join(root, "x")
    storage.write_bytes_atomic(path, b"0123456789")
    with storage.open_read(path) as file:
        file.seek(7)
        assert file.read(2) == b"78"


def test_read_range(root: str) -> None:
    path = storage.join(root, "x")
    storage.write_bytes_atomic(path, b"0123456789")
    assert storage.read_range(path, 3, 4) == b"3456"
    assert storage.read_range(path, 8, 4) == b"89"
    assert storage.read_range(path, 10, 4) == storage.read_range(path, 3, 0) == b""


def test_digest(root: str) -> None:
    path = storage.join(root, "x")
    storage.write_bytes_atomic(path, b"123456789")
    assert storage.digest(path) == storage.Digest(9, 0xE3069283)  # the check value of CRC32C
    with pytest.raises(StorageError, match="does not exist"):
        storage.digest(storage.join(root, "none"))


def test_remove_files(root: str) -> None:
    paths = [storage.join(root, name) for name in "abc"]
    for path in paths:
        storage.write_bytes_atomic(path, b"")
    storage.remove(paths[0])
    storage.remove(paths[0])
    storage.remove_files(paths[:2])
    assert storage.listdir(root) == ["c"]


def test_only_one_of_many_writes_a_version(root: str) -> None:
    path = storage.join(root, "lease")
    assert storage.read_version(path) is None
    with futures.ThreadPoolExecutor(8) as pool:
        tries = [pool.submit(storage.write_version, path, b"%d" % n, None) for n in range(8)]
    winners = [n for n, task in enumerate(tries) if not task.exception()]
    assert len(winners) == 1
    assert {type(t.exception()) for t in tries if t.exception()} == {storage.ConflictError}
    first = tries[winners[0]].result()
    assert storage.read_version(path) == (b"%d" % winners[0], first)
    second = storage.write_version(path, b"renewed", first)
    for attempt in (
        lambda: storage.write_version(path, b"late", first),
        lambda: storage.write_version(path, b"late", None),
        lambda: storage.remove_version(path, first),
    ):
        with pytest.raises(storage.ConflictError, match="changed by somebody else"):
            attempt()
    assert storage.read_version(path) == (b"renewed", second)
    storage.remove_version(path, second)
    assert storage.read_version(path) is None
    with pytest.raises(storage.ConflictError):
        storage.write_version(path, b"late", second)
    with pytest.raises(storage.ConflictError):
        storage.remove_version(path, second)


def test_rename_file_and_directory(root: str) -> None:
    storage.write_text_atomic(storage.join(root, "old", "x"), "1")
    storage.rename(storage.join(root, "old"), storage.join(root, "new"))
    assert not storage.exists(storage.join(root, "old", "x"))
    assert storage.read_text(storage.join(root, "new", "x")) == "1"
    storage.write_text_atomic(storage.join(root, "y"), "2")
    with pytest.raises(storage.ConflictError):
        storage.rename(storage.join(root, "y"), storage.join(root, "new", "x"))
    assert storage.read_text(storage.join(root, "new", "x")) == "1"
    storage.rename(storage.join(root, "y"), storage.join(root, "new", "y"))
    assert storage.listdir(storage.join(root, "new")) == ["x", "y"]


def test_failed_write_leaves_the_old_file_and_nothing_else(root: str) -> None:
    path = storage.join(root, "x")
    storage.write_text_atomic(path, "old")

    def interrupted() -> None:
        with storage.open_write_atomic(path) as file:
            file.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert storage.read_text(path) == "old"
    assert storage.listdir(root) == ["x"]


def test_makedirs_twice_is_fine(root: str) -> None:
    for _ in range(2):
        storage.makedirs(storage.join(root, "a", "b"))
    storage.write_text_atomic(storage.join(root, "a", "b", "x"), "")
    assert storage.isdir(storage.join(root, "a", "b"))


def test_missing_file_says_so(root: str) -> None:
    path = storage.join(root, "missing")
    for action in (storage.read_bytes, storage.read_text, storage.open_read, storage.listdir):
        with pytest.raises(StorageError, match=r"cannot (read|list) .*missing: .*does not exist"):
            action(path)


# ---------------------------------------------------------------- local failures


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "disk is full; free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_system_error_becomes_one_line_and_old_content_stays(
    code: int, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "x")
    storage.write_text_atomic(path, "old")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=message) as caught:
        storage.write_text_atomic(path, "new")
    assert caught.value.exit_code == 4
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)
    assert storage.read_text(path) == "old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_full_disk(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log"
    file = storage.AppendedFile(str(path), b"", None)
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="cannot write .*/log: the disk is full"):
        file.add(b"x" * 2**20)


def test_file_where_a_directory_should_be(tmp_path: pathlib.Path) -> None:
    storage.write_text_atomic(str(tmp_path / "x"), "")
    below = str(tmp_path / "x" / "y")
    with pytest.raises(StorageError, match="cannot write .*is a file"):
        storage.write_text_atomic(below, "")
    with pytest.raises(StorageError, match="cannot make directory .*is a file"):
        storage.makedirs(below)
    with pytest.raises(StorageError, match="cannot read .*it is a directory"):
        storage.read_bytes(str(tmp_path))


def test_text_that_is_not_utf8(tmp_path: pathlib.Path) -> None:
    storage.write_bytes_atomic(str(tmp_path / "x"), b"\xff\xfe")
    with pytest.raises(StorageError, match="x: it is not UTF-8"):
        storage.read_text(str(tmp_path / "x"))


def test_errors_of_the_writer_inside_the_block_keep_their_kind(tmp_path: pathlib.Path) -> None:
    def broken(error: Exception) -> None:
        with storage.open_write_atomic(str(tmp_path / "x")):
            raise error

    with pytest.raises(CheckpointError, match="mine"):
        broken(CheckpointError("mine"))
    with pytest.raises(ZeroDivisionError):
        broken(ZeroDivisionError())
    assert os.listdir(tmp_path) == []


def test_written_file_is_readable_by_others(tmp_path: pathlib.Path) -> None:
    old = os.umask(0o022)
    try:
        storage.write_text_atomic(str(tmp_path / "x"), "")
    finally:
        os.umask(old)
    assert os.stat(tmp_path / "x").st_mode & 0o777 == 0o644


# ---------------------------------------------------------------- remote


def test_unknown_scheme_is_one_line() -> None:
    with pytest.raises(StorageError, match="cannot read nope://a/b: .*nope"):
        storage.read_bytes("nope://a/b")


def test_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from google import cloud

    monkeypatch.delattr(cloud, "storage", raising=False)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    cloud_requests.forget_client()
    with pytest.raises(StorageError, match=r"stylegan-trainer\[gcs\]"):
        storage.read_bytes("gs://bucket/x")


def test_client_error_of_any_kind_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class CredentialsError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise CredentialsError("no credentials\nread the manual")

    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "_open", fail)
    with pytest.raises(StorageError, match="cannot read memory://a/b: no credentials read"):
        storage.read_bytes("memory://a/b")


# ---------------------------------------------------------------- paths


def test_resolve(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.resolve("~/x") == str(tmp_path / "x")
    assert storage.resolve("gs://b/~x") == "gs://b/~x"
    assert storage.resolve("file:///a/b") == "/a/b"
    assert storage.resolve("a/b") == "a/b"
    assert storage.isdir(storage.resolve("package:core"))
    assert storage.exists(storage.join(storage.resolve("package:core"), "storage.py"))


@pytest.mark.parametrize("path", ["~", "~/x", "~nobody-by-this-name/x"])
def test_a_home_that_is_not_known_is_no_directory_named_so(
    path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """As of the users that containers are given: no HOME, and nothing in /etc/passwd."""

    def unknown(user: object) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        StorageError, match=f"cannot tell what ~.* means in '{path}'.*write the path"
    ):
        storage.resolve(path)
    assert storage.resolve(f"./{path}") == f"./{path}"
    (tmp_path / "~draft.yaml").touch()
    assert storage.resolve("~draft.yaml") == "~draft.yaml"


def test_no_place_for_temporary_files(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a read-only disk."""

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in [...]")

    monkeypatch.setattr("tempfile.gettempdir", none)
    why = "no directory for temporary files.*set TMPDIR"
    with pytest.raises(StorageError, match=why), storage.open_write_atomic(f"{gcs.url}/f") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("path", "other", "expected"),
    [
        ("a/b.yaml", "c.yaml", "a/c.yaml"),
        ("a/b.yaml", "../c.yaml", "c.yaml"),
        ("b.yaml", "./c.yaml", "c.yaml"),
        ("a/b.yaml", "/c.yaml", "/c.yaml"),
        ("a/b.yaml", "gs://x/c.yaml", "gs://x/c.yaml"),
        ("gs://x/a/b.yaml", "../c.yaml", "gs://x/c.yaml"),
        ("gs://x/b.yaml", "/c.yaml", "/c.yaml"),
        ("gs://x/a//b.yaml", "c.yaml", "gs://x/a//c.yaml"),
        ("gs://x//b.yaml", "./c.yaml", "gs://x//c.yaml"),
        ("gs://x/a//b.yaml", "../c//d.yaml", "gs://x/a/c//d.yaml"),
        ("gs://x/b.yaml", "../../c.yaml", "gs://x/c.yaml"),
    ],
)
def test_sibling(path: str, other: str, expected: str) -> None:
    assert storage.sibling(path, other) == expected


def test_is_remote_and_join() -> None:
    assert storage.is_remote("gs://b/x")
    assert not storage.is_remote("file:///x")
    assert not storage.is_remote("package:data/x")
    assert storage.join("gs://b/x", "y", "z") == "gs://b/x/y/z"
    assert storage.join("x", "y") == os.path.join("x", "y")
