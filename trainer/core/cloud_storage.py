"""Files on Cloud Storage, for `trainer.core.storage`: the one place that knows Google's client.

Every request is tried again, after random waits that grow, until it succeeds, fails for good or a
deadline passes; what was carried out although its answer got lost is not taken for a failure.
Whole contents are checked against Cloud Storage's CRC32C both ways. No field of an answer is taken
for granted: listings of objects under a key of the customer's (CMEK) have no checksums, for one.
What an answer lacks is asked for object by object, and where the store doesn't know it either, it
is found by reading. Failures leave as the client's own exceptions; `reason` puts them into words.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import posixpath
import re
import secrets
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import IO, Any, TypeVar

import google_crc32c

from trainer.core.errors import StorageError

RETRY_SECONDS = 120.0
REWRITE_SECONDS = 1.0  # an object written more often is answered 429
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 16.0
_REQUEST_SECONDS = 60  # without a byte
_TRANSIENT_CODES = {408, 429, 500, 502, 503, 504}
_AT_ONCE = 8
_CONNECTIONS = 64  # that are kept for the next request

_FIRST_BLOCK = 1 << 16
_LARGEST_BLOCK = 1 << 24

T = TypeVar("T")
_Content = TypeVar("_Content", bytes, str)  # itself, or the name of a file with it on the disk


class NoBucketError(FileNotFoundError):
    """There is no such bucket."""


class _ShortError(ConnectionError):
    """Fewer bytes came than were asked for, or others than are stored."""


# ---- requests ------------------------------------------------------------------------------------


@functools.cache
def _client() -> Any:
    """The client of this process, which its threads share."""
    try:
        import requests
        from google.auth import exceptions
        from google.cloud import storage
    except ImportError as error:
        raise StorageError(
            f"gs:// paths need Google's client ({error}); pip install 'stylegan-trainer[gcs]'"
        ) from error
    try:
        client = storage.Client(project=None)  # objects need none; the credentials' own is billed
    except exceptions.DefaultCredentialsError:
        client = storage.Client.create_anonymous_client()  # public data can be read by everybody
    client._http.hooks["response"].append(_check_form)
    for scheme in ("https://", "http://"):  # or a line of urllib3's for each thread too many
        client._http.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS))
    return client


def _check_form(response: Any, **unused: Any) -> None:
    """Raises a failure whose body isn't Google's JSON: proxies and balancers answer what they like,
    and Google's client looks into anything that it can parse."""
    from google.api_core import exceptions

    if response.status_code < 400 or response.status_code == 401:  # after 401 it logs in anew
        return
    try:
        known = isinstance(response.json()["error"]["message"], str)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise exceptions.from_http_status(response.status_code, response.text)


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
            return (
                f"wrong project or billing ({said}); choose the project that pays with "
                "GOOGLE_CLOUD_QUOTA_PROJECT"
            )
        return (
            f"permission denied ({said}); give the account a role on bucket {bucket} such as "
            "Storage Object Admin, or log in as another"
        )
    if isinstance(error, exceptions.PreconditionFailed):
        return (
            f"Cloud Storage refused it, as it isn't what it was when this job last looked ({said}); "
            "look whether another job writes there, and run the same command again"
        )
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
    # A proxy's page has its text between tags.
    details = re.sub(r"(?s)<(style|script)\b.*?</\1>|<[^>]*>", " ", str(details))
    return " ".join(details.split())[:200] or "no reason given"


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
    blob = _stat(path)
    return digest(path)[0] if blob.size is None else int(blob.size)


def digest(path: str) -> tuple[int, int]:
    """Size and CRC32C of an object, as Cloud Storage knows them; read if it doesn't."""
    return _size_and_crc(_stat(path), path)


def _size_and_crc(blob: Any, path: str) -> tuple[int, int]:
    """Of an object whose description was fetched; it is read if that lacks them."""
    length, crc = blob.size, _crc32c(blob)
    return _measured(path) if length is None or crc is None else (int(length), crc)


class _Sums(io.RawIOBase):
    """A file that keeps the length and CRC32C of what is written."""

    def __init__(self) -> None:
        self.length = self.crc = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.length += len(data)
        self.crc = google_crc32c.extend(self.crc, bytes(data))
        return len(data)


def _measured(path: str) -> tuple[int, int]:
    """Size and CRC32C of an object, by reading all of it."""

    def measure(**options: Any) -> _Sums:
        sums = _Sums()
        _blob(path).download_to_file(sums, raw_download=True, checksum="crc32c", **options)
        return sums

    try:
        sums = _tried(measure)
    except Exception as error:
        raise _read_error(error, path) from error
    return sums.length, sums.crc


def _crc32c(blob: Any) -> int | None:
    return None if blob.crc32c is None else int.from_bytes(base64.b64decode(blob.crc32c), "big")


def generation(path: str) -> int:
    """Of an object; one request."""
    return _generation(_stat(path), path)


def _generation(blob: Any, path: str) -> int:
    if blob.generation is None:
        raise StorageError(
            f"cannot tell which generation of {path} is there: the answer has none; use a store "
            "that keeps generations, as Cloud Storage does"
        )
    return int(blob.generation)


def listdir(path: str) -> list[str]:
    """The names one level below."""
    _, name = _split(path)
    prefix = f"{name}/" if name else ""
    objects, folders = _list(path, prefix, delimiter="/")
    names = {blob.name for blob in objects} | {folder.rstrip("/") for folder in folders}
    found = {name[len(prefix) :] for name in names} - {""}
    if not names and name:
        raise FileNotFoundError(path)
    return sorted(found)


def walk(path: str) -> Iterator[tuple[str, int, int | None]]:
    """Name below `path`, bytes and CRC32C (None if the listing has none) of each object.

    Names that end with '/', and '' for `path` itself, are what Google's console makes for an empty
    folder.
    """
    bucket, name = _split(path)
    prefix = f"{name}/" if name else ""
    objects, _ = _list(path, prefix)
    for blob in objects:
        length, crc = blob.size, _crc32c(blob)
        if length is None and not blob.name.endswith("/"):
            length, crc = digest(f"gs://{bucket}/{blob.name}")
        yield blob.name[len(prefix) :], int(length or 0), crc


# ---- reading -------------------------------------------------------------------------------------


def read(path: str) -> tuple[bytes, int]:
    """An object's content and generation."""
    data, blob = _download(path, _whole)
    while blob.generation is None:  # the answer to a read had none: read that which there is now
        generation = _generation(_stat(path), path)
        try:
            return _download(path, _whole, generation)[0], generation
        except FileNotFoundError:
            continue  # it has changed meanwhile
    return data, int(blob.generation)


def get_file(path: str, local: str) -> None:
    """Copies an object to the disk."""

    def download(blob: Any, **options: Any) -> str:
        blob.download_to_filename(local, checksum="crc32c", **options)
        return local

    _download(path, download)


def _whole(blob: Any, **options: Any) -> bytes:
    return bytes(blob.download_as_bytes(checksum="crc32c", **options))


def _download(
    path: str, request: Callable[..., _Content], generation: int | None = None
) -> tuple[_Content, Any]:
    """All of an object, compared with its CRC32C, and its description as far as it came along."""

    def once(**options: Any) -> tuple[_Content, Any]:
        blob = _blob(path, generation)
        content = request(blob, **options)
        # Without a checksum beside the content, the client compares nothing. (The content of what
        # is stored compressed is not that which the checksum is of.)
        if blob.crc32c is None and blob.content_encoding is None:
            known = _blob(path, generation or blob.generation)
            known.reload(**options)
            if known.crc32c is None:
                _note_no_checksums(_split(path)[0])
            _compare(path, _sums(content), known)
        return content, blob

    try:
        return _tried(once)
    except Exception as error:
        raise _read_error(error, path) from error


@functools.cache
def _note_no_checksums(bucket: str) -> None:
    text = f"note: gs://{bucket} tells no checksums; of what is read there only sizes are compared"
    print(text, file=sys.stderr, flush=True)


def _sums(content: _Content) -> tuple[int, int]:
    """Length and CRC32C of bytes, or of the file of that name on the disk."""
    if isinstance(content, bytes):
        return len(content), google_crc32c.value(content)
    sums = _Sums()
    with open(content, "rb") as file:
        while block := file.read(_LARGEST_BLOCK):
            sums.write(block)
    return sums.length, sums.crc


def _compare(path: str, sums: tuple[int, int], blob: Any) -> None:
    """Refuses bytes that are not those of an object, as far as that is known."""
    for name, here, there in zip(
        ("bytes", "CRC32C"), sums, (blob.size, _crc32c(blob)), strict=True
    ):
        if there is not None and here != there:
            raise _ShortError(f"{path} has {name} {there}, {here} came over")


def read_range(path: str, offset: int, length: int, generation: int | None = None) -> bytes:
    """A part of an object; shorter at its end."""
    from google.api_core.exceptions import RequestRangeNotSatisfiable

    if length <= 0:
        return b""
    blob = _blob(path, generation)
    request = functools.partial(blob.download_as_bytes, raw_download=True, checksum=None)
    try:
        data = bytes(_tried(request, start=offset, end=offset + length - 1))
    except RequestRangeNotSatisfiable:
        return b""
    except Exception as error:
        raise _read_error(error, path) from error
    _check_plain(blob, path)
    return data


def _check_plain(blob: Any, path: str) -> None:
    """A part of a compressed object is nothing that anybody could read."""
    if blob.content_encoding not in (None, "", "identity"):
        raise StorageError(
            f"cannot read parts of {path}: it is stored compressed (Content-Encoding: "
            f"{blob.content_encoding}); store it as it is: `gcloud storage cp` without -Z and -z"
        )


class _Reader(io.RawIOBase):
    """An object as a file. Blocks grow while it is read from one end to the other."""

    def __init__(self, path: str):
        blob = _stat(path)
        _check_plain(blob, path)
        self._path, self._generation = path, _generation(blob, path)
        self._size = digest(path)[0] if blob.size is None else int(blob.size)
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


def put_new_file(path: str, local: str) -> bool:
    """Writes an object from a file on the disk if there is none; whether there was none."""
    from google.api_core.exceptions import PreconditionFailed

    try:
        _upload(path, _blob(path).upload_from_filename, local, if_generation_match=0)
    except PreconditionFailed:
        return False
    return True


def _upload(path: str, request: Any, content: _Content, **kwargs: Any) -> None:
    """Writes an object by one of a blob's methods. The store gets the CRC32C, and must compare."""
    blob, sums = request.__self__, _sums(content)

    def upload(**options: Any) -> None:
        blob.crc32c = base64.b64encode(sums[1].to_bytes(4, "big")).decode()
        request(content, checksum=None, **options, **kwargs)
        _compare(path, sums, blob)

    try:
        _tried(upload)
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
        pass  # unless it was us, and the answer got lost
    else:
        if blob.generation is not None:
            return int(blob.generation)
    try:
        found, now = read(path)
    except FileNotFoundError:
        return None
    return now if found == data else None


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


def append(path: str, data: bytes, state: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Adds to the end of an object, without reading what is there or sending it again.

    Args:
      path: the object.
      data: what to add.
      state: generation, bytes and CRC32C of the object.

    Returns:
      The new state; None if the object is of another generation, or gone.
    """
    from google.api_core.exceptions import NotFound, PreconditionFailed

    folder, name = posixpath.split(path)
    # Not the object's name in it: TensorBoard reads every file with `tfevents` in its name. And one
    # of its own each time: another job may be adding to the object that has replaced this one.
    tail = _blob(posixpath.join(folder, tail_name(name, secrets.token_hex(4))))
    _upload(path, tail.upload_from_string, data)
    before, length, crc = state
    expected = length + len(data), google_crc32c.extend(crc, data)
    blob = _blob(path)
    try:
        # Composed a second time, if the first answer got lost, it would be there twice.
        _tried(blob.compose, [_blob(path), tail], if_generation_match=before)
        done = blob.generation is not None
    except (NotFound, PreconditionFailed):
        done = False
    if not done:
        # It was us, and the answer got lost or holds no generation?
        try:
            blob = _stat(path)
            done = _size_and_crc(blob, path) == expected
        except FileNotFoundError:
            done = False
    _delete([tail.name], path)
    return (_generation(blob, path), *expected) if done else None


def tail_name(name: str, token: str) -> str:
    """Of the object that is added to another one."""
    return f".{zlib.crc32(name.encode()):08x}.{token}.tail"


def shorten(path: str, length: int, generation: int) -> bool:
    """Writes an object of this generation anew with its first bytes; whether it was of this one."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    blob = _blob(path)
    try:
        _tried(blob.reload)
        if _generation(blob, path) != generation:
            return False
        if length == (size(path) if blob.size is None else int(blob.size)):
            _copy(blob, _blob(path), if_generation_match=generation)
            return True
        with tempfile.NamedTemporaryFile() as file:
            for start in range(0, length, _LARGEST_BLOCK):
                block = min(_LARGEST_BLOCK, length - start)
                file.write(read_range(path, start, block, generation))
            file.flush()
            request = _blob(path).upload_from_filename
            _upload(path, request, file.name, if_generation_match=generation)
    except (FileNotFoundError, NotFound, PreconditionFailed):
        return False
    return True


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


def rename(source: str, target: str) -> bool:
    """Copies an object, or all below, within Cloud Storage, then removes the old.

    Returns:
      Whether all could be copied; False if there was an object of that name with another content.
    """
    from google.api_core.exceptions import PreconditionFailed

    _, old = _split(source)
    bucket, new = _split(target)
    here, there = _client().bucket(_split(source)[0]), _client().bucket(bucket)
    names = _below(source)
    if not names:
        raise FileNotFoundError(source)

    def copy(name: str) -> None:
        blob, copied = here.blob(name), there.blob(new + name[len(old) :])
        try:
            _copy(blob, copied, if_generation_match=0)
        except PreconditionFailed:
            _tried(blob.reload)
            _tried(copied.reload)
            descriptions = (
                (each, f"gs://{each.bucket.name}/{each.name}") for each in (blob, copied)
            )
            if len({_size_and_crc(*each) for each in descriptions}) > 1:
                raise
            # It was us, and the answer got lost.

    try:
        _each(copy, names)
    except PreconditionFailed:
        return False
    except Exception as error:
        raise _missing(error, target) from error
    _delete(names, source)
    return True


def _copy(blob: Any, copied: Any, **preconditions: Any) -> None:
    token = None
    while True:  # large ones are copied in several requests
        token, _, _ = _tried(copied.rewrite, blob, token=token, **preconditions)
        if token is None:
            return
