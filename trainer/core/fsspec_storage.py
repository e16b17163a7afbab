"""Files behind any URL that fsspec knows, for `trainer.core.storage`; gs:// has its own module.

The same functions as in `trainer.core.cloud_storage`. Not every such store can compare and write in
one step: there `put_if` and `remove_if` leave a moment between the two.
"""

from __future__ import annotations

import posixpath
import zlib
from collections.abc import Iterator
from typing import IO, Any

import google_crc32c

from trainer.core.errors import StorageError

REWRITE_SECONDS = 0.0
_BLOCK = 1 << 22


def _open(path: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it."""
    try:
        import fsspec

        # Listings change behind our back (other hosts write too), so none is remembered.
        return fsspec.core.url_to_fs(path, use_listings_cache=False)
    except ImportError as error:
        raise StorageError(f"cannot open {path}: {error}") from error


def isfile(path: str) -> bool:
    fs, name = _open(path)
    return bool(fs.isfile(name))


def isdir(path: str) -> bool:
    fs, name = _open(path)
    return bool(fs.isdir(name))


def exists(path: str) -> bool:
    fs, name = _open(path)
    return bool(fs.exists(name))


def size(path: str) -> int:
    fs, name = _open(path)
    return int(fs.size(name))


def digest(path: str) -> tuple[int, int]:
    length = crc = 0
    with open_read(path) as file:
        while block := file.read(_BLOCK):
            length, crc = length + len(block), google_crc32c.extend(crc, block)
    return length, crc


def listdir(path: str) -> list[str]:
    fs, name = _open(path)
    found = {posixpath.basename(entry.rstrip("/")) for entry in fs.ls(name, detail=False)}
    return sorted(found - {"", posixpath.basename(name.rstrip("/"))})


def walk(path: str) -> Iterator[tuple[str, int, None]]:
    fs, root = _open(path)
    for name, entry in fs.find(root, detail=True).items():
        yield posixpath.relpath(name, fs._strip_protocol(root)), int(entry.get("size") or 0), None


def read(path: str) -> tuple[bytes, int]:
    with open_read(path) as file:
        data = file.read()
    return data, zlib.crc32(data) + 1


def read_range(path: str, offset: int, length: int) -> bytes:
    fs, name = _open(path)
    return bytes(fs.cat_file(name, start=offset, end=offset + max(length, 0)))


def get_file(path: str, local: str) -> None:
    fs, name = _open(path)
    fs.get_file(name, local)


def open_read(path: str) -> IO[bytes]:
    fs, name = _open(path)
    return fs.open(name, "rb")


def put(path: str, data: bytes) -> None:
    fs, name = _open(path)
    fs.makedirs(posixpath.dirname(name), exist_ok=True)
    fs.pipe_file(name, data)


def put_file(path: str, local: str) -> None:
    fs, name = _open(path)
    fs.makedirs(posixpath.dirname(name), exist_ok=True)
    fs.put_file(local, name)


def put_new_file(path: str, local: str) -> bool:
    if isfile(path):
        return False
    put_file(path, local)
    return True


def put_if(path: str, data: bytes, generation: int) -> int | None:
    if (read(path)[1] if isfile(path) else 0) != generation:
        return None
    put(path, data)
    return zlib.crc32(data) + 1


def remove_if(path: str, generation: int) -> bool:
    if not isfile(path) or read(path)[1] != generation:
        return False
    remove(path)
    return True


def generation(path: str) -> int:
    return read(path)[1]


def append(path: str, data: bytes, state: tuple[int, int, int]) -> tuple[int, int, int] | None:
    before, length, crc = state
    whole = (read(path)[0] if isfile(path) else b"") + data
    after = put_if(path, whole, before)
    return None if after is None else (after, length + len(data), google_crc32c.extend(crc, data))


def shorten(path: str, length: int, generation: int) -> bool:
    return put_if(path, read_range(path, 0, length), generation) is not None


def makedirs(path: str) -> None:
    fs, name = _open(path)
    fs.makedirs(name, exist_ok=True)


def remove(path: str) -> None:
    fs, name = _open(path)
    if fs.isfile(name):
        fs.rm_file(name)


def remove_tree(path: str) -> None:
    fs, name = _open(path)
    if fs.exists(name):
        fs.rm(name, recursive=True)


def rename(source: str, target: str) -> bool:
    fs, name = _open(source)
    if exists(target):
        return False
    fs.mv(name, _open(target)[1], recursive=bool(fs.isdir(name)))
    return True
