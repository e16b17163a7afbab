"""Files and directories, on a local disk or behind any fsspec URL (`gs://...`).

Everything the trainer reads and writes goes through here, so that every path can be remote, no
reader ever sees a half-written file, and every failure is one line that says what to do. Paths are
text; take user input through `resolve` once. Local paths need nothing but the standard library;
fsspec and gcsfs are imported when the first remote path is met.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from trainer.core.errors import StorageError, TrainerError

_PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PACKAGE_PREFIX = "package:"

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
    directory, `file://` is dropped; other URLs and paths stay as they are.
    """
    if path.startswith(_PACKAGE_PREFIX):
        return os.path.join(_PACKAGE_ROOT, *path[len(_PACKAGE_PREFIX) :].split("/"))
    if path.startswith("file://"):
        return path[len("file://") :]
    return path if is_remote(path) else os.path.expanduser(path)


def join(path: str, *parts: str) -> str:
    """The path of something below `path`."""
    return posixpath.join(path, *parts) if is_remote(path) else os.path.join(path, *parts)


def sibling(path: str, other: str) -> str:
    """What `other`, written inside the file `path`, means: relative to that file's directory."""
    target = resolve(other)
    if is_remote(target) or os.path.isabs(target):
        return target
    if is_remote(path):
        scheme, _, rest = path.partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(posixpath.dirname(rest), target))}"
    return os.path.normpath(os.path.join(os.path.dirname(path), target))


def _reason(error: BaseException) -> str:
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
    except OSError as error:
        raise StorageError(f"cannot {action} {path}: {_reason(error)}") from error
    except Exception as error:
        # The clients of object stores raise what they like: HTTP, credentials, a missing package.
        if not is_remote(path):
            raise
        raise StorageError(f"cannot {action} {path}: {_reason(error)}") from error


def _remote(path: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it."""
    try:
        import fsspec

        # Listings change behind our back (other hosts write too), so none is remembered.
        return fsspec.core.url_to_fs(path, use_listings_cache=False)
    except ImportError as error:
        scheme = path.partition("://")[0]
        extra = " (pip install 'stylegan-trainer[gcs]')" if scheme in {"gs", "gcs"} else ""
        raise StorageError(f"cannot open {path}: {error}{extra}") from error


def exists(path: str) -> bool:
    """Whether there is a file or directory."""
    if not is_remote(path):
        return os.path.exists(path)
    with _reported("look for", path):
        fs, name = _remote(path)
        return bool(fs.exists(name))


def isdir(path: str) -> bool:
    """Whether there is a directory."""
    if not is_remote(path):
        return os.path.isdir(path)
    with _reported("look for", path):
        fs, name = _remote(path)
        return bool(fs.isdir(name))


def size(path: str) -> int:
    """Bytes in a file."""
    with _reported("read", path):
        if not is_remote(path):
            return os.path.getsize(path)
        fs, name = _remote(path)
        return int(fs.size(name))


def listdir(path: str) -> list[str]:
    """The sorted names in a directory."""
    with _reported("list", path):
        if not is_remote(path):
            return sorted(os.listdir(path))
        fs, name = _remote(path)
        found = {posixpath.basename(entry.rstrip("/")) for entry in fs.ls(name, detail=False)}
        return sorted(found - {"", posixpath.basename(name.rstrip("/"))})


def makedirs(path: str) -> None:
    """Makes a directory and those above it, where they are not there yet."""
    with _reported("make directory", path):
        if not is_remote(path):
            os.makedirs(path, exist_ok=True)
        else:
            fs, name = _remote(path)
            fs.makedirs(name, exist_ok=True)


def open_read(path: str) -> IO[bytes]:
    """A binary file object to read from, seekable."""
    with _reported("read", path):
        if not is_remote(path):
            return open(path, "rb")
        fs, name = _remote(path)
        return fs.open(name, "rb")


def read_bytes(path: str) -> bytes:
    """The content of a file."""
    with _reported("read", path), open_read(path) as file:
        return file.read()


def read_text(path: str) -> str:
    """The content of a UTF-8 file."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"cannot read {path}: it is not UTF-8 text ({error.reason})") from error


@contextlib.contextmanager
def open_write_atomic(path: str) -> Iterator[IO[bytes]]:
    """A binary file object whose content appears at `path` when the block ends, or never.

    Locally the bytes go to a temporary file beside it, reach the disk, and take the name in one
    step; an object store does the same by itself. Directories above are made.
    """
    if is_remote(path):
        with _write_remote(path) as file:
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
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        _sync_directory(folder or ".")


@contextlib.contextmanager
def _write_remote(path: str) -> Iterator[IO[bytes]]:
    # Uploading while writing would leave the first half of an interrupted write as the object.
    with _reported("write", path), tempfile.NamedTemporaryFile() as file:
        yield file
        file.flush()
        fs, name = _remote(path)
        fs.put_file(file.name, name)


def _sync_directory(folder: str) -> None:
    """Makes a rename survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes_atomic(path: str, data: bytes) -> None:
    """Writes a file whole or not at all, over an older one if there is one."""
    with open_write_atomic(path) as file:
        file.write(data)


def write_text_atomic(path: str, text: str) -> None:
    """`write_bytes_atomic` of UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def append_text(path: str, text: str) -> None:
    """Adds UTF-8 text to the end of a file, which is made where there is none.

    Object stores cannot append: there the file is written anew, so keep it small.
    """
    data = text.encode("utf-8")
    if is_remote(path):
        write_bytes_atomic(path, (read_bytes(path) if exists(path) else b"") + data)
        return
    with _reported("write", path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "ab") as file:
            file.write(data)


def remove_tree(path: str) -> None:
    """Removes a file, or a directory with all it holds; nothing there is fine."""
    with _reported("remove", path):
        if is_remote(path):
            fs, name = _remote(path)
            if fs.exists(name):
                fs.rm(name, recursive=True)
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.remove(path)


def rename(source: str, target: str) -> None:
    """Gives a file or directory another name in the same store; a file there is replaced.

    In one step locally; an object store copies and removes.
    """
    with _reported("rename to", target):
        if not is_remote(source):
            os.replace(source, target)
            return
        fs, name = _remote(source)
        fs.mv(name, _remote(target)[1], recursive=bool(fs.isdir(name)))
