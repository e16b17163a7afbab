"""Files on Cloud Storage, for `trainer.core.storage`: the one place that knows Google's client.

Every request is tried again, after random waits that grow, until it succeeds, fails for good or a
deadline passes; what was carried out although its answer got lost is not taken for a failure.
Whole contents are checked against Cloud Storage's CRC32C both ways. Failures leave as the
client's own exceptions; `reason` puts them into words.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import posixpath
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import IO, Any, TypeVar

from trainer.core.errors import StorageError

RETRY_SECONDS = 120.0
REWRITE_SECONDS = 1.0  # an object written more often is answered 429
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 16.0
_REQUEST_SECONDS = 60  # without a byte
_TRANSIENT_CODES = {408, 429, 500, 502, 503, 504}
_AT_ONCE = 8

_FIRST_BLOCK = 1 << 16
_LARGEST_BLOCK = 1 << 24

T = TypeVar("T")


class NoBucketError(FileNotFoundError):
    """There is no such bucket."""


class _ShortError(ConnectionError):
    """Fewer bytes came than were asked for."""


# ---- requests ------------------------------------------------------------------------------------


@functools.cache
def _client() -> Any:
    """The client of this process, which its threads share."""
    try:
        from google.auth import exceptions
        from google.cloud import storage
    except ImportError as error:
        raise StorageError(
            f"gs:// paths need Google's client ({error}); pip install 'stylegan-trainer[gcs]'"
        ) from error
    try:
        return storage.Client(project=None)  # objects need none; the credentials' own is billed
    except exceptions.DefaultCredentialsError:
        return storage.Client.create_anonymous_client()  # public data can be read by everybody


def forget_client() -> None:
    """Lets the next request log in anew, with what the environment says then."""
    _client.cache_clear()


os.register_at_fork(after_in_child=forget_client)  # two processes must not share connections


def _is_transient(error: Exception) -> bool:
    import requests
    import urllib3
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption

    if isinstance(error, exceptions.GoogleAPICallError):
        return error.code in _TRANSIENT_CODES
    if isinstance(error, GoogleAuthError):
        return bool(error.retryable)
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.MissingSchema):
        return False
    broken = (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        requests.exceptions.ContentDecodingError,
        urllib3.exceptions.HTTPError,
        ConnectionError,
        TimeoutError,
        DataCorruption,
    )
    return isinstance(error, broken)


def _tried(request: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The result of a request that may be made again and again."""
    from google.api_core.retry import Retry

    retry = Retry(
        predicate=_is_transient,
        initial=_FIRST_WAIT_SECONDS,
        maximum=_LONGEST_WAIT_SECONDS,
        timeout=RETRY_SECONDS,
    )
    once = functools.partial(request, *args, retry=None, timeout=_REQUEST_SECONDS, **kwargs)
    return retry(once)()


def _split(path: str) -> tuple[str, str]:
    bucket, _, name = path.partition("://")[2].partition("/")
    if not bucket:
        raise StorageError(f"{path} names no bucket; write gs://bucket/name")
    return bucket, name.rstrip("/")


def _blob(path: str, generation: int | None = None) -> Any:
    bucket, name = _split(path)
    if not name:
        raise IsADirectoryError(f"{path} is a bucket")
    return _client().bucket(bucket).blob(name, generation=generation)


def _list(path: str, prefix: str, **options: Any) -> tuple[list[Any], set[str]]:
    """Objects and folders (their last '/' included) whose names in the bucket begin so."""
    bucket, _ = _split(path)
    client = _client()
    fields = "items(name,size,crc32c),prefixes,nextPageToken"

    def pages(**kwargs: Any) -> tuple[list[Any], set[str]]:
        found = client.list_blobs(bucket, prefix=prefix, fields=fields, **options, **kwargs)
        return list(found), set(found.prefixes)

    try:
        return _tried(pages)
    except Exception as error:
        raise _missing(error, path) from error


def _missing(error: Exception, path: str) -> Exception:
    """What an error of a request to a bucket, or of a write, means when it says 'not found'."""
    from google.api_core.exceptions import NotFound

    bucket, _ = _split(path)
    return NoBucketError(f"no bucket {bucket}") if isinstance(error, NotFound) else error


def _read_error(error: Exception, path: str) -> Exception:
    """The same for a read of one object, which may be missing too."""
    from google.api_core.exceptions import NotFound

    if not isinstance(error, NotFound):
        return error
    try:
        _list(path, "", max_results=1)
    except NoBucketError as missing:
        return missing
    except Exception:  # it may be forbidden; then less is known
        return FileNotFoundError(path)
    return FileNotFoundError(path)


def reason(error: BaseException, path: str) -> str | None:
    """Why a request failed and what to do about it, in one line; None if it says it itself."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    bucket, _ = _split(path)
    waited = ""
    if isinstance(error, exceptions.RetryError):
        waited = f" for {RETRY_SECONDS:.0f} s"
        error = error.cause or error
    if isinstance(error, NoBucketError):
        return f"there is no bucket {bucket}; check its name, or make it"
    if isinstance(error, exceptions.Unauthorized | GoogleAuthError):
        return (
            "Google takes no or only expired credentials from here; log in with 'gcloud auth "
            "application-default login', or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
        )
    said = _said(error)
    if isinstance(error, exceptions.Forbidden) or "user project" in said:
        if "project" in said or "billing" in said:
            return f"wrong project or billing ({said}); choose another with GOOGLE_CLOUD_PROJECT"
        return (
            f"permission denied ({said}); give the account a role on bucket {bucket} such as "
            "Storage Object Admin, or log in as another"
        )
    if isinstance(error, exceptions.PreconditionFailed):
        return "somebody else has changed it meanwhile; make sure that only one job writes there"
    if isinstance(error, exceptions.GoogleAPICallError) and error.code in _TRANSIENT_CODES:
        return f"Cloud Storage answered {error.code}{waited} ({said}); run the same command again"
    if waited:
        return f"Cloud Storage could not be reached{waited} ({said}); check the network"
    return None


def _said(error: BaseException) -> str:
    """What the server said, without the request that it said it to."""
    details = getattr(error, "message", None) or str(error)
    response = getattr(error, "response", None)
    try:
        details = response.json()["error"]["message"] if response is not None else details
    except (KeyError, TypeError, ValueError):
        details = str(details).partition("(Caused by")[0]
    return " ".join(str(details).split())[:200]


# ---- looking -------------------------------------------------------------------------------------


def _stat(path: str) -> Any:
    blob = _blob(path)
    try:
        _tried(blob.reload)
    except Exception as error:
        raise _read_error(error, path) from error
    return blob


def isfile(path: str) -> bool:
    """Whether there is an object; one request."""
    return bool(_split(path)[1]) and bool(_tried(_blob(path).exists))


def isdir(path: str) -> bool:
    """Whether there are objects below."""
    _, name = _split(path)
    objects, _ = _list(path, f"{name}/" if name else "", max_results=1)
    return bool(objects) or not name


def exists(path: str) -> bool:
    """Whether there is an object, or objects below."""
    return isfile(path) or isdir(path)


def size(path: str) -> int:
    """Bytes of an object."""
    return int(_stat(path).size)


def digest(path: str) -> tuple[int, int]:
    """Size and CRC32C of an object, as Cloud Storage knows them: nothing is read."""
    blob = _stat(path)
    return int(blob.size), _crc32c(blob)


def _crc32c(blob: Any) -> int:
    return int.from_bytes(base64.b64decode(blob.crc32c), "big")


def listdir(path: str) -> list[str]:
    """The names one level below."""
    _, name = _split(path)
    prefix = f"{name}/" if name else ""
    objects, folders = _list(path, prefix, delimiter="/")
    names = {blob.name for blob in objects} | {folder.rstrip("/") for folder in folders}
    found = {name[len(prefix) :] for name in names} - {""}
    if not found and name:
        raise FileNotFoundError(path)
    return sorted(found)


def walk(path: str) -> Iterator[tuple[str, int, int]]:
    """Name below `path`, bytes and CRC32C of each object however deep."""
    _, name = _split(path)
    prefix = f"{name}/" if name else ""
    objects, _ = _list(path, prefix)
    for blob in objects:
        if not blob.name.endswith("/"):  # what Google's console makes for an empty folder
            yield blob.name[len(prefix) :], int(blob.size or 0), _crc32c(blob)


# ---- reading -------------------------------------------------------------------------------------


def read(path: str) -> tuple[bytes, int]:
    """An object's content and generation."""
    blob = _blob(path)
    try:
        data = _tried(blob.download_as_bytes, checksum="crc32c")
    except Exception as error:
        raise _read_error(error, path) from error
    return data, int(blob.generation or 0)


def get_file(path: str, local: str) -> None:
    """Copies an object to the disk."""
    try:
        _tried(_blob(path).download_to_filename, local, checksum="crc32c")
    except Exception as error:
        raise _read_error(error, path) from error


def read_range(path: str, offset: int, length: int, generation: int | None = None) -> bytes:
    """A part of an object; shorter at its end."""
    from google.api_core.exceptions import RequestRangeNotSatisfiable

    if length <= 0:
        return b""
    blob = _blob(path, generation)
    try:
        return _tried(blob.download_as_bytes, start=offset, end=offset + length - 1, checksum=None)
    except RequestRangeNotSatisfiable:
        return b""
    except Exception as error:
        raise _read_error(error, path) from error


class _Reader(io.RawIOBase):
    """An object as a file. Blocks grow while it is read from one end to the other."""

    def __init__(self, path: str):
        blob = _stat(path)
        self._path, self._size, self._generation = path, int(blob.size), int(blob.generation)
        self._position = 0
        self._start = 0
        self._buffer = b""
        self._block = _FIRST_BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("seek before the file's start")
        self._position = base + offset
        return self._position

    def readinto(self, target: Any) -> int:
        view = memoryview(target)
        if not self._start <= self._position < self._start + len(self._buffer):
            self._fetch(len(view))
        at = self._position - self._start
        data = self._buffer[at : at + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, wanted: int) -> None:
        goes_on = bool(self._buffer) and self._position == self._start + len(self._buffer)
        self._block = min(4 * self._block, _LARGEST_BLOCK) if goes_on else _FIRST_BLOCK
        length = min(max(self._block, wanted), self._size - self._position)
        self._start = self._position
        self._buffer = read_range(self._path, self._position, length, self._generation)
        if len(self._buffer) < length:
            raise _ShortError(f"{length} bytes asked for, {len(self._buffer)} got")


def open_read(path: str) -> IO[bytes]:
    """An object as a file, in the generation that is there now."""
    return io.BufferedReader(_Reader(path), buffer_size=_FIRST_BLOCK)


# ---- writing -------------------------------------------------------------------------------------


def put(path: str, data: bytes) -> None:
    """Writes an object, over an older one if there is one."""
    _upload(path, _blob(path).upload_from_string, data, content_type="application/octet-stream")


def put_file(path: str, local: str) -> None:
    """Writes an object from a file on the disk."""
    _upload(path, _blob(path).upload_from_filename, local)


def _upload(path: str, request: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        _tried(request, *args, checksum="crc32c", **kwargs)
    except Exception as error:
        raise _missing(error, path) from error


def put_if(path: str, data: bytes, generation: int) -> int | None:
    """Writes an object if it is of this generation still; 0: if there is none.

    Returns:
      The new generation; None if somebody else was faster.
    """
    from google.api_core.exceptions import PreconditionFailed

    blob = _blob(path)
    try:
        _upload(path, blob.upload_from_string, data, if_generation_match=generation)
    except PreconditionFailed:
        try:
            found, now = read(path)
        except FileNotFoundError:
            return None
        return now if found == data else None  # it was us, and the answer got lost
    return int(blob.generation)


def remove_if(path: str, generation: int) -> bool:
    """Removes an object if it is of this generation still; whether it was."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    tries = 0

    def delete(**options: Any) -> None:
        nonlocal tries
        tries += 1
        _blob(path).delete(if_generation_match=generation, **options)

    try:
        _tried(delete)
    except (NotFound, PreconditionFailed):
        return tries > 1 and not isfile(path)  # it was us, and the answer got lost
    return True


def append(path: str, data: bytes) -> None:
    """Adds to the end of an object, without reading what is there or sending it again."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    blob = _blob(path)
    try:
        _tried(blob.reload)
    except NotFound:
        put(path, data)
        return
    before, generation = int(blob.size), int(blob.generation)
    folder, name = posixpath.split(path)
    # Not the object's name in it: TensorBoard reads every file with `tfevents` in its name.
    tail = _blob(posixpath.join(folder, f".{zlib.crc32(name.encode()):08x}.tail"))
    _upload(path, tail.upload_from_string, data)
    try:
        # Composed a second time, if the first answer got lost, it would be there twice.
        _tried(blob.compose, [blob, tail], if_generation_match=generation)
    except PreconditionFailed:
        if size(path) != before + len(data):
            raise
    _delete([tail.name], path)


def makedirs(path: str) -> None:
    """Nothing: there are no directories, only names with '/' in them."""
    _split(path)


# ---- removing and renaming -----------------------------------------------------------------------


def _delete(names: Iterable[str], path: str) -> None:
    """Removes objects of a path's bucket; those that are not there are removed already."""
    from google.api_core.exceptions import NotFound

    bucket = _client().bucket(_split(path)[0])

    def delete(name: str) -> None:
        try:
            _tried(bucket.blob(name).delete)
        except NotFound:
            return

    _each(delete, list(names))


def _each(action: Callable[[str], None], names: list[str]) -> None:
    """Several at a time."""
    if len(names) == 1:
        action(names[0])
        return
    with futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(action, names))


def remove(path: str) -> None:
    """Removes an object; nothing there is fine. One request."""
    _delete([_split(path)[1]], path)


def remove_files(paths: Iterable[str]) -> None:
    """Removes objects of one bucket."""
    paths = list(paths)
    _delete([_split(path)[1] for path in paths], paths[0])


def remove_tree(path: str) -> None:
    """Removes an object and all below it; nothing there is fine."""
    _delete(_below(path), path)


def _below(path: str) -> list[str]:
    _, name = _split(path)
    if not name:
        raise IsADirectoryError(f"{path} is a bucket")
    objects, _ = _list(path, name)
    return [b.name for b in objects if b.name == name or b.name.startswith(f"{name}/")]


def rename(source: str, target: str) -> None:
    """Copies an object, or all below, within Cloud Storage, then removes the old."""
    _, old = _split(source)
    bucket, new = _split(target)
    here, there = _client().bucket(_split(source)[0]), _client().bucket(bucket)
    names = _below(source)
    if not names:
        raise FileNotFoundError(source)

    def copy(name: str) -> None:
        blob, token = here.blob(name), None
        copied = there.blob(new + name[len(old) :])
        while True:  # large ones are copied in several requests
            token, _, _ = _tried(copied.rewrite, blob, token=token)
            if token is None:
                return

    try:
        _each(copy, names)
    except Exception as error:
        raise _missing(error, target) from error
    _delete(names, source)
