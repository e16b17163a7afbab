"""Files and directories, on a local disk, on Cloud Storage (`gs://...`) or behind any fsspec URL.

Everything the trainer reads and writes goes through here, so that every path can be remote, no
reader ever sees a half-written file, and every failure is one line that says what to do. Paths are
text; take user input through `resolve` once. Local paths need little but the standard library;
the clients of remote stores are imported when the first remote path is met.

Requests to Cloud Storage cost money and time: `isfile` is one, `exists` and `isdir` may list, and
`digest` of a file reads nothing of it.

It is one file, longer than others, so that there is one name for each thing that can be done to a
path, wherever that lies.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
import importlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import IO

import google_crc32c

from trainer.core import output
from trainer.core.errors import StorageError, TrainerError

_PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PACKAGE_PREFIX = "package:"

_BLOCK = 1 << 22
_LOCK_SECONDS = 20.0  # whoever has a lock needs it for milliseconds

TAIL = re.compile(r"\.[0-9a-f]{8}\.[0-9a-f]{8}\.tail")
"""Names of what a process that was killed may leave when it added to a file in a store."""

Fence = Callable[[], AbstractContextManager[None]]
"""Makes the block in which something is put in its place; it raises if that may not be done."""

_HOMELESS = "HOME is not set, and the system doesn't know this user"

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another path",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another path",
    errno.EFBIG: "the file system allows no file this large; choose another path",
    errno.EACCES: "permission denied; check who owns it, or choose another path",
    errno.EPERM: "not permitted; check who owns it, or choose another path",
    errno.EROFS: "the file system is read-only; choose another path",
    errno.ENOENT: "it does not exist; check the path",
    errno.ENOTDIR: "a part of the path is a file, not a directory; check the path",
    errno.EISDIR: "it is a directory, not a file; check the path",
    errno.EEXIST: "it exists already and is a file; check the path",
    errno.ENOTEMPTY: "the directory is not empty; remove it or choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def is_remote(path: str) -> bool:
    """Whether the path is a URL, such as gs://bucket/name."""
    return "://" in path and not path.startswith("file://")


def resolve(path: str) -> str:
    """The path a user's text means.

    `package:data/x` is the directory `data/x` inside the installed package, `~` is the home
    directory, `file://` is dropped, `gcs://` is `gs://`; other URLs and paths stay as they are.

    Raises:
      StorageError: `~` has no meaning here, as for a user whom the machine doesn't know.
    """
    if path.startswith(_PACKAGE_PREFIX):
        return os.path.join(_PACKAGE_ROOT, *path[len(_PACKAGE_PREFIX) :].split("/"))
    if path.startswith("file://"):
        return path[len("file://") :]
    if path.startswith("gcs://"):
        return f"gs://{path[len('gcs://') :]}"
    if is_remote(path) or not path.startswith("~"):
        return path
    expanded, first = os.path.expanduser(path), path.partition("/")[0]
    # What can't be expanded comes back as it is, and would be made as a directory of that name.
    if expanded.startswith("~") and (first == "~" or not os.path.lexists(first)):
        whose = f"there is no user {first[1:]}" if first != "~" else _HOMELESS
        raise StorageError(
            f"cannot tell what {first} means in {path!r} ({whose}); write the path out, or "
            f"./{path} for one that begins so"
        )
    return expanded


def join(path: str, *parts: str) -> str:
    """The path of something below `path`; in a URL names may be empty, as in gs://bucket/a//b."""
    if not is_remote(path):
        return os.path.join(path, *parts)
    for part in parts:
        path += part if path.endswith("/") else f"/{part}"
    return path


def sibling(path: str, other: str) -> str:
    """The path that `other`, written in the file `path`, means: relative to its directory."""
    target = resolve(other)
    if is_remote(target) or os.path.isabs(target):
        return target
    if is_remote(path):
        scheme, _, rest = path.partition("://")
        host, *names = rest.split("/")[:-1]
        for name in target.split("/"):
            if name == "..":
                names = names[:-1]
            elif name != ".":
                names.append(name)
        return f"{scheme}://{'/'.join([host, *names])}"
    return os.path.normpath(os.path.join(os.path.dirname(path), target))


def _reader(path: str) -> ModuleType:
    """The module for listings and plain reads of a URL."""
    if path.startswith("gs://"):
        from trainer.core import cloud_reading

        return cloud_reading
    return _store(path)


def _store(path: str) -> ModuleType:
    """The module for all else."""
    if path.startswith("gs://"):
        from trainer.core import cloud_storage

        return cloud_storage
    from trainer.core import fsspec_storage

    return fsspec_storage


def _reason(error: BaseException, path: str) -> str:
    if path.startswith("gs://"):
        from trainer.core import cloud_requests

        known = cloud_requests.reason(error, path)
        if known is not None:
            return known
    code = getattr(error, "errno", None)
    if code in _REASONS:
        return _REASONS[code]
    if isinstance(error, FileNotFoundError):
        return _REASONS[errno.ENOENT]
    if isinstance(error, PermissionError):
        return _REASONS[errno.EACCES]
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text or type(error).__name__


@contextlib.contextmanager
def _reported(action: str, path: str) -> Iterator[None]:
    """Turns a failure to `action` `path` into a StorageError."""
    try:
        yield
    except TrainerError:
        raise
    except Exception as error:
        # The clients of remote stores raise what they like: HTTP, credentials, a missing package.
        if not is_remote(path) and not isinstance(error, OSError):
            raise
        raise StorageError(f"cannot {action} {path}: {_reason(error, path)}") from error


# ---- looking -------------------------------------------------------------------------------------


def exists(path: str) -> bool:
    """Whether there is a file or directory."""
    if not is_remote(path):
        return os.path.exists(path)
    with _reported("look for", path):
        return bool(_reader(path).exists(path))


def isfile(path: str) -> bool:
    """Whether there is a file."""
    if not is_remote(path):
        return os.path.isfile(path)
    with _reported("look for", path):
        return bool(_reader(path).isfile(path))


def isdir(path: str) -> bool:
    """Whether there is a directory."""
    if not is_remote(path):
        return os.path.isdir(path)
    with _reported("look for", path):
        return bool(_reader(path).isdir(path))


def size(path: str) -> int:
    """Bytes in a file."""
    with _reported("read", path):
        return int(_reader(path).size(path)) if is_remote(path) else os.path.getsize(path)


@dataclass(frozen=True)
class Digest:
    """The description of a file, without its content.

    Attributes:
      bytes: how many.
      crc32c: of them; None where it is not known without reading.
    """

    bytes: int
    crc32c: int | None


def digest(path: str) -> Digest:
    """Size and checksum of a file; Cloud Storage knows both without reading."""
    with _reported("read", path):
        if is_remote(path):
            return Digest(*_reader(path).digest(path))
        length = crc = 0
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                length, crc = length + len(block), google_crc32c.extend(crc, block)
        return Digest(length, crc)


def bucket_location(path: str) -> str:
    """Where the bucket of a gs:// path is: a region, as us-central1, or several, as us."""
    with _reported("look for the bucket of", path):
        return str(_reader(path).location(path))


def listdir(path: str) -> list[str]:
    """The sorted names in a directory."""
    with _reported("list", path):
        return _reader(path).listdir(path) if is_remote(path) else sorted(os.listdir(path))


def walk(path: str, *, folders: bool = False) -> dict[str, Digest]:
    """Every file below a directory, however deep, by its name from there on; by one listing.

    {} where there is no directory. Files may come and go meanwhile. The checksums are known only on
    Cloud Storage.

    Args:
      path: the directory.
      folders: give objects whose names end with '/', too, which stand for empty folders.
    """
    with _reported("list", path):
        if is_remote(path):
            return {
                name: Digest(size, crc)
                for name, size, crc in _reader(path).walk(path)
                if folders or not f"/{name}".endswith("/")
            }
        found = {}
        for folder, _, names in os.walk(path):
            for name in names:
                file = os.path.join(folder, name)
                relative = os.path.relpath(file, path).replace(os.sep, "/")
                # What others have renamed or removed meanwhile isn't there any more.
                with contextlib.suppress(FileNotFoundError):
                    found[relative] = Digest(os.path.getsize(file), None)
        return found


# ---- reading -------------------------------------------------------------------------------------


def open_read(path: str) -> IO[bytes]:
    """A binary file object to read from, seekable."""
    with _reported("read", path):
        return _reader(path).open_read(path) if is_remote(path) else open(path, "rb")


def read_bytes(path: str) -> bytes:
    """The content of a file."""
    with _reported("read", path):
        if is_remote(path):
            return _store(path).read(path)[0]
        with open(path, "rb") as file:
            return file.read()


def read_range(path: str, offset: int, length: int) -> bytes:
    """A part of a file, in one request; less at the file's end."""
    with _reported("read", path):
        if is_remote(path):
            return _reader(path).read_range(path, offset, length)
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(max(length, 0))


def read_text(path: str) -> str:
    """The content of a UTF-8 file."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"cannot read {path}: it is not UTF-8 text ({error.reason})") from error


# ---- writing -------------------------------------------------------------------------------------


def makedirs(path: str) -> None:
    """Makes a directory and those above it, where they are not there yet."""
    with _reported("make directory", path):
        if is_remote(path):
            _store(path).makedirs(path)
        else:
            os.makedirs(path, exist_ok=True)


@contextlib.contextmanager
def open_write_atomic(
    path: str, *, new: bool = False, fence: Fence = contextlib.nullcontext
) -> Iterator[IO[bytes]]:
    """A binary file object whose content appears at `path` when the block ends, or never.

    Locally the bytes go to a temporary file beside it, reach the disk, and take the name in one
    step; an object store does the same by itself. Directories above are made.

    Args:
      path: the file.
      new: never replace a file; one with the same content is fine.
      fence: around the step in which it appears.

    Raises:
      ConflictError: `new`, and there is another file.
      StorageError: it cannot be written.
    """
    if is_remote(path):
        with _write_remote(path, new, fence) as file:
            yield file
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    with _reported("write", path):
        os.makedirs(folder or ".", exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with fence():
                if new:
                    _give_new_name(temporary, path)
                else:
                    os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        _sync_directory(folder or ".")


def _give_new_name(temporary: str, path: str) -> None:
    """Renames a local file, unless there is another one of that name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        _check_same(temporary, path)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}:
            raise
        # A file system without hard links.
        if not os.path.lexists(path):
            os.replace(temporary, path)
            return
        _check_same(temporary, path)
    os.remove(temporary)


def _check_same(local: str, path: str) -> None:
    """Raises ConflictError if a file is another than the local one that was to become it."""
    if digest(local) != digest(path):
        raise _conflict(path)


@contextlib.contextmanager
def _write_remote(path: str, new: bool, fence: Fence) -> Iterator[IO[bytes]]:
    # Uploading while writing would leave the first half of an interrupted write as the object.
    with _reported("write", path):
        try:
            with tempfile.NamedTemporaryFile(dir=temporary_directory()) as file:
                yield file
                file.flush()
                with fence():
                    if not new:
                        _store(path).put_file(path, file.name)
                    elif not _store(path).put_new_file(path, file.name):
                        _check_same(file.name, path)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            raise StorageError(
                f"cannot write {path}: the disk of temporary files ({tempfile.gettempdir()}) is "
                "full; free some space, or set TMPDIR to a directory on another"
            ) from error


def temporary_directory() -> str:
    """The directory for temporary files.

    Raises:
      StorageError: there is none that can be written.
    """
    try:
        return tempfile.gettempdir()
    except OSError as error:
        raise StorageError(
            "there is no directory for temporary files: neither TMPDIR nor the usual ones can be "
            "written; set TMPDIR to one that can"
        ) from error


def _sync_directory(folder: str) -> None:
    """Makes a rename survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync(path: str) -> None:
    """Makes a local file that another library wrote survive a power cut."""
    with _reported("write", path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    _sync_directory(os.path.dirname(path) or ".")


def upload(local: str, path: str) -> None:
    """Copies a local file to a remote store, whole or not at all."""
    with _reported("write", path):
        _store(path).put_file(path, local)


def download(path: str, local: str) -> None:
    """Copies a file of a remote store to the disk."""
    with _reported(f"copy to {os.path.dirname(local) or '.'} the file", path):
        _store(path).get_file(path, local)


def write_bytes_atomic(path: str, data: bytes, fence: Fence = contextlib.nullcontext) -> None:
    """Writes a file whole or not at all, over an older one if there is one.

    Args:
      path: the file.
      data: its content.
      fence: around the step in which it appears.
    """
    if is_remote(path):
        with _reported("write", path), fence():
            _store(path).put(path, data)
        return
    with open_write_atomic(path, fence=fence) as file:
        file.write(data)


def write_text_atomic(path: str, text: str, fence: Fence = contextlib.nullcontext) -> None:
    """`write_bytes_atomic` of UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"), fence)


def shorten(path: str, length: int, version: str, fence: Fence = contextlib.nullcontext) -> None:
    """Writes a file anew that keeps its first bytes, or all: whoever adds to it finds it changed.

    Args:
      path: the file.
      length: bytes to keep.
      version: as `version` told before it was read. In a store nothing is written if it is of
        another one.
      fence: around the step in which the new file appears.

    Raises:
      ConflictError: it is of another version.
    """
    if is_remote(path):
        with _reported("write", path), fence():
            if not _store(path).shorten(path, length, int(version)):
                raise _conflict(path)
        return
    with open_read(path) as file, open_write_atomic(path, fence=fence) as copy:
        for start in range(0, length, _BLOCK):
            copy.write(file.read(min(_BLOCK, length - start)))


# ---- removing and renaming -----------------------------------------------------------------------


def remove(path: str) -> None:
    """Removes a file; nothing there is fine."""
    with _reported("remove", path):
        if is_remote(path):
            _store(path).remove(path)
            return
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def remove_files(paths: Iterable[str]) -> None:
    """Removes files of one store, several at a time; those that are not there are fine."""
    paths = list(paths)
    if paths and paths[0].startswith("gs://"):
        with _reported("remove", paths[0]):
            _store(paths[0]).remove_files(paths)
        return
    for path in paths:
        remove(path)


def remove_tree(path: str) -> None:
    """Removes a file, or a directory with all it holds; nothing there is fine."""
    with _reported("remove", path):
        if is_remote(path):
            _store(path).remove_tree(path)
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.remove(path)


def remove_empty(path: str) -> None:
    """Removes a directory that holds nothing; another one stays."""
    if is_remote(path):
        return  # without files there is none
    with contextlib.suppress(OSError):
        os.rmdir(path)


def rename(source: str, target: str) -> None:
    """Gives a file or directory a name in the same store that nothing has yet.

    In one step locally; an object store copies, each object only if there is none of its new name,
    and removes.

    Raises:
      ConflictError: there is something of that name.
    """
    with _reported("rename to", target):
        if is_remote(source):
            if not _store(source).rename(source, target):
                raise _conflict(target)
        elif os.path.lexists(target):
            raise _conflict(target)
        else:
            os.rename(source, target)


# ---- versions: writing only what nobody else has changed -----------------------------------------


class ConflictError(StorageError):
    """Somebody else has written or removed the file since its version was read."""


def version(path: str) -> str:
    """A file's version, as `read_version` tells it; of a local one ''.

    Those who need to compare local files have a `Fence`.
    """
    with _reported("read", path):
        return str(_reader(path).generation(path)) if is_remote(path) else ""


def read_version(path: str) -> tuple[bytes, str] | None:
    """A file's content and its version, which every write changes; None if there is no file."""
    with _reported("read", path):
        try:
            if is_remote(path):
                data, generation = _store(path).read(path)
                return data, str(generation)
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError as error:
            if type(error) is not FileNotFoundError:  # no bucket: more than a file is missing
                raise
            return None
        return data, _version(data)


def write_version(path: str, data: bytes, version: str | None) -> str:
    """Writes a file if it is of this version still, in one step that cannot be divided.

    Args:
      path: the file.
      data: its new content, such as no other process writes: it tells one's own success, if the
        answer got lost, from another's.
      version: as `read_version` told; None: only if there is no file.

    Returns:
      The new version.

    Raises:
      ConflictError: it is not; nothing was written.
      StorageError: it cannot be written.
    """
    with _reported("write", path):
        if is_remote(path):
            new = _store(path).put_if(path, data, int(version or 0))
            if new is None:
                raise _conflict(path)
            return str(new)
        folder = os.path.dirname(path) or "."
        os.makedirs(folder, exist_ok=True)
        # Only what must not be divided is done with the lock.
        write_bytes_atomic(path, data, lambda: _unchanged(path, version))
        return _version(data)


def remove_version(path: str, version: str) -> None:
    """Removes a file if it is of this version still.

    Raises:
      ConflictError: it is not.
    """
    with _reported("remove", path):
        if is_remote(path):
            if not _store(path).remove_if(path, int(version)):
                raise _conflict(path)
            return
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise _conflict(path)
        with _unchanged(path, version):
            os.remove(path)


@contextlib.contextmanager
def _unchanged(path: str, version: str | None) -> Iterator[None]:
    """A block in which nobody else writes a version of a local file, which is of this one still."""
    with locked(os.path.dirname(path) or "."):
        if _version_now(path) != version:
            raise _conflict(path)
        yield


def _conflict(path: str) -> ConflictError:
    return ConflictError(
        f"{path} was changed by somebody else; make sure that only one job writes there"
    )


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version_now(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return _version(file.read())
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keeps others that want this lock out, as far as the file system knows locks; they wait.

    Raises:
      StorageError: another process has it for long, as one does that was stopped.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        ends = time.monotonic() + _LOCK_SECONDS
        while not _lock(handle):
            if time.monotonic() > ends:
                raise StorageError(
                    f"cannot write to {folder}: {_holder(handle)} has its lock for "
                    f"{_LOCK_SECONDS:g} s now, as a process does that is stopped; let it go on "
                    "(kill -CONT) or end it (kill -KILL), and run the same command again"
                )
            time.sleep(0.005)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether a lock was taken, or none exist: some network file systems lock no directories."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _holder(handle: int) -> str:
    """The holder of an open directory's lock, for messages."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/locks") as file:
        for line in file:  # 1: FLOCK ADVISORY WRITE 4711 08:01:1234 0 EOF
            fields = line.split()
            if fields[1] == "FLOCK" and int(fields[5].split(":")[2]) == os.fstat(handle).st_ino:
                return f"process {fields[4]}"
    return "another process"


# ---- appending -----------------------------------------------------------------------------------


class AppendedFile:
    """A file to which this process adds, and nobody else.

    It begins anew, with the content that stays: whoever added to it before, and was paused since,
    finds another file. Object stores take an object anew no more than once a second. There bytes
    that come sooner wait for the next call, for `flush` or for the end of the program.

    Args:
      path: the file.
      content: with which it begins.
      version: of the file that it replaces, as `read_version` told; None if there was none.
      fence: around every change.

    Raises:
      ConflictError: somebody else has written the file since.
      StorageError: it cannot be written.
    """

    def __init__(
        self,
        path: str,
        content: bytes,
        version: str | None,
        fence: Fence = contextlib.nullcontext,
    ) -> None:
        self._path, self._fence = path, fence
        self._lock = threading.RLock()
        self._pending = b""
        self._written = 0.0
        self._state: tuple[int, int, int] = (0, 0, 0)  # generation, bytes and CRC32C
        if not is_remote(path):
            write_bytes_atomic(path, content, fence)
            return
        with _reported("write", path), fence():
            generation = _store(path).put_if(path, content, int(version or 0))
            if generation is None:
                raise _conflict(path)
        self._state = (generation, len(content), google_crc32c.value(content))
        self._written = time.monotonic()
        _appended.add(self)

    @property
    def path(self) -> str:
        """The file."""
        return self._path

    def add(self, data: bytes) -> None:
        """Adds to the end of the file."""
        if not is_remote(self._path):
            # Opened anew each time: an editor may have put another file there.
            with (
                _reported("write", self._path),
                self._fence(),
                open(self._path, "ab") as file,
            ):
                file.write(data)
            return
        with self._lock:
            self._pending += data
            if self._wait() <= 0:
                self._write()

    def flush(self) -> None:
        """Writes what is held back."""
        if self._pending:
            time.sleep(max(0.0, self._wait()))
            with self._lock:
                self._write()

    def _wait(self) -> float:
        """Seconds until the file may be written again."""
        return self._written + _store(self._path).REWRITE_SECONDS - time.monotonic()

    def _write(self) -> None:
        if not self._pending:
            return
        try:
            with _reported("write", self._path), self._fence():
                state = _store(self._path).append(self._path, self._pending, self._state)
                if state is None:
                    raise _conflict(self._path)
        except ConflictError:
            self._pending = b""  # the file is another's: nothing more is to be written
            raise
        self._state, self._pending, self._written = state, b"", time.monotonic()


_appended: weakref.WeakSet[AppendedFile] = weakref.WeakSet()


@atexit.register
def _flush_appended() -> None:
    for file in list(_appended):
        try:
            file.flush()
        except StorageError as error:  # nobody is there any more to catch it
            output.log(f"the end of {file.path} was not written: {error}")


# ---- TensorFlow's own file system ----------------------------------------------------------------


def prepare_tensorflow(path: str) -> None:
    """Makes sure that TensorFlow itself can open a path, for records, checkpoints and events.

    Raises:
      StorageError: it cannot, as some builds cannot open gs:// without tensorflow-io.
    """
    if not is_remote(path):
        return
    import tensorflow as tf

    scheme = path.partition("://")[0]
    if scheme in tf.io.gfile.get_registered_schemes():
        return
    try:
        importlib.import_module("tensorflow_io")
    except (ImportError, NotImplementedError) as error:
        raise StorageError(
            f"this TensorFlow ({tf.__version__}) cannot open {scheme}://, and tensorflow-io does "
            f"not help ({error}); install TensorFlow 2.17 with the extra "
            "(pip install 'stylegan-trainer[io]'), or a build of it that can"
        ) from error
