"""Listings and plain reads of Cloud Storage, for `trainer.core.storage`, through fsspec with gcsfs.

gcsfs sends them because many small reads at once, as those of a conversion, take it a third of the
time and of the processor that google-cloud-storage takes. Of gcsfs only the requests are used, for
what it builds of them does less than is needed here:

- It tries again six times whatever came, without a deadline, and logs each end as a traceback. So
  failures go past it (`_Failed`) to `cloud_requests.tried`.
- It logs in by itself, in the one thread that serves all requests. So the credentials are those of
  `cloud_requests.client`.
- `find`, `ls` and `info` ask a second time where nothing is found, or always, for every field.
- `open` reads whatever generation is there then: two in one file, where it is replaced meanwhile.
- Its default class asks Google for the kind of each bucket first, by another protocol.

Nothing is remembered of what was found. No field of an answer is taken for granted: listings of
objects under a key of the customer's (CMEK) have no checksums, for one. What an answer lacks is
asked for object by object, and where the store doesn't know it either, it is found by reading.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator
from typing import IO, Any

import google_crc32c

from trainer.core import cloud_requests
from trainer.core.cloud_requests import (
    NoBucketError,
    ShortError,
    missing,
    split,
    split_object,
)
from trainer.core.errors import StorageError

_BLOCK = 5 << 20
_LARGEST_BLOCK = 1 << 24

_Info = dict[str, Any]  # of an object, as JSON


# ---- requests ------------------------------------------------------------------------------------


class _Failed(Exception):
    """Carries the error that is its cause past gcsfs and aiohttp, which would try again."""


class _CompressedError(Exception):
    """An object is stored otherwise than it was written."""


@functools.cache
def _filesystem(client: Any) -> Any:
    """gcsfs for those who have this client; one of before a fork is never used nor closed."""
    import aiohttp
    from gcsfs.core import GCSFileSystem

    seconds = cloud_requests.REQUEST_SECONDS
    return GCSFileSystem(
        token="anon",  # `_send` logs in
        endpoint_url=client.api_endpoint,
        requests_timeout=aiohttp.ClientTimeout(connect=seconds, sock_read=seconds),
        session_kwargs={"middlewares": [_send], "trust_env": True},
        skip_instance_cache=True,
        use_listings_cache=False,
    )


async def _send(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
    """Sends a request of gcsfs, once, and takes the whole answer."""
    try:
        return await _sent(request, handler)
    except Exception as error:
        raise _Failed from error


async def _sent(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
    from google.api_core import exceptions
    from google.auth.transport.requests import Request

    # aiohttp takes back some of the quoting that Google asks for.
    parts = (urllib.parse.unquote(part) for part in request.url.raw_path.split("/"))
    path = "/".join(urllib.parse.quote(part, safe="") for part in parts)
    request.url = request.url.with_path(path, encoded=True, keep_query=True)
    credentials = cloud_requests.client()._credentials
    for refused in (False, True):
        if refused or not credentials.valid:
            await asyncio.to_thread(credentials.refresh, Request())
        credentials.apply(request.headers)
        request.headers.update(cloud_requests.billing())
        answer = await handler(request)
        if answer.status != 401:
            break
        await answer.read()
    try:
        if answer.status >= 400:
            raise exceptions.from_http_status(answer.status, await _message(answer))
        if "alt" in request.url.query:  # content; before it would be unpacked
            _check_plain(answer.headers.get("X-Goog-Stored-Content-Encoding"))
            _check_plain(answer.headers.get("Content-Encoding"))
        await answer.read()  # which gives the connection back
    except BaseException:
        answer.close()
        raise
    return answer


async def _message(answer: Any) -> str:
    """The text of a refusal; proxies and balancers answer in forms of their own, not in JSON."""
    try:
        return str((await answer.json(content_type=None))["error"]["message"])
    except (KeyError, TypeError, ValueError):
        return str(await answer.text(errors="replace"))


def _check_plain(encoding: str | None) -> None:
    """A part of a compressed object is nothing that anybody could read."""
    if encoding not in (None, "", "identity"):
        raise _CompressedError(
            f"it is stored compressed (Content-Encoding: {encoding}), and no parts of it can be "
            "read; store it as it is: `gcloud storage cp` without -Z and -z"
        )


def _tried(request: str, *args: Any, **kwargs: Any) -> Any:
    """The result of one of gcsfs's methods that makes a single request."""

    def once() -> Any:
        try:
            return getattr(_filesystem(cloud_requests.client()), request)(*args, **kwargs)
        except _Failed as failed:
            assert failed.__cause__ is not None
            raise failed.__cause__ from None

    return cloud_requests.tried(once)


# ---- looking -------------------------------------------------------------------------------------


def listing(
    path: str, prefix: str, delimiter: str | None = None, *, first: bool = False
) -> tuple[list[_Info], set[str]]:
    """Objects and folders (their last '/' included) whose names in the bucket begin so.

    Args:
      path: of the bucket, or something in it.
      prefix: of the names.
      delimiter: '/' for folders instead of what is below them.
      first: one object is enough.
    """
    bucket, _ = split(path)
    objects: list[_Info] = []
    folders: set[str] = set()
    token = None
    while True:
        try:
            page = _tried(
                "call",
                "GET",
                "b/{}/o",
                bucket,
                prefix=prefix or None,
                delimiter=delimiter,
                maxResults=1 if first else None,
                pageToken=token,
                fields="items(name,size,crc32c),prefixes,nextPageToken",
                json_out=True,
            )
        except Exception as error:
            raise missing(error, path) from error
        objects += page.get("items", ())
        folders.update(page.get("prefixes", ()))
        token = page.get("nextPageToken")
        if token is None or (first and objects):
            return objects, folders


def read_error(error: Exception, path: str) -> Exception:
    """The meaning of an error of reading an object: the object may be missing, or the bucket."""
    from google.api_core.exceptions import NotFound

    if not isinstance(error, NotFound):
        return error
    try:
        listing(path, "", first=True)
    except NoBucketError as missing:
        return missing
    except Exception:  # it may be forbidden; then less is known
        return FileNotFoundError(path)
    return FileNotFoundError(path)


def stat(path: str) -> _Info:
    """The description of an object; one request."""
    fields = "size,crc32c,generation,contentEncoding"
    try:
        info: _Info = _tried(
            "call", "GET", "b/{}/o/{}", *split_object(path), fields=fields, json_out=True
        )
    except Exception as error:
        raise read_error(error, path) from error
    return info


def location(path: str) -> str:
    """Where the bucket of a path is, in lower case; '' if the store doesn't say."""
    try:
        info = _tried("call", "GET", "b/{}", split(path)[0], fields="location", json_out=True)
    except Exception as error:
        raise missing(error, path) from error
    return str(info.get("location", "")).lower()


def isfile(path: str) -> bool:
    """Whether there is an object; one request."""
    from google.api_core.exceptions import NotFound

    bucket, name = split(path)
    try:
        return bool(name) and bool(_tried("call", "GET", "b/{}/o/{}", bucket, name, fields="name"))
    except NotFound:
        return False


def isdir(path: str) -> bool:
    """Whether there are objects below."""
    _, name = split(path)
    objects, _ = listing(path, f"{name}/" if name else "", first=True)
    return bool(objects) or not name


def exists(path: str) -> bool:
    """Whether there is an object, or objects below."""
    return isfile(path) or isdir(path)


def size(path: str, info: _Info | None = None) -> int:
    """Bytes of an object, as `stat` tells them; read if it doesn't."""
    info = stat(path) if info is None else info
    return int(info["size"]) if "size" in info else _measured(path)[0]


def digest(path: str, info: _Info | None = None) -> tuple[int, int]:
    """Size and CRC32C of an object, as `stat` tells them; read if it doesn't."""
    info = stat(path) if info is None else info
    crc = crc32c(info.get("crc32c"))
    return _measured(path) if "size" not in info or crc is None else (int(info["size"]), crc)


def crc32c(text: str | None) -> int | None:
    """The CRC32C that Cloud Storage writes so."""
    return None if text is None else int.from_bytes(base64.b64decode(text), "big")


def _measured(path: str) -> tuple[int, int]:
    """Size and CRC32C of an object, by reading all of it."""
    length = crc = 0
    while block := read_range(path, length, _LARGEST_BLOCK):
        length, crc = length + len(block), google_crc32c.extend(crc, block)
    return length, crc


def generation(path: str, info: _Info | None = None) -> int:
    """The description of an object, in the form of `stat`."""
    info = stat(path) if info is None else info
    if "generation" not in info:
        raise StorageError(
            f"cannot tell which generation of {path} is there: the answer has none; use a store "
            "that keeps generations, as Cloud Storage does"
        )
    return int(info["generation"])


def listdir(path: str) -> list[str]:
    """The names one level below."""
    _, name = split(path)
    prefix = f"{name}/" if name else ""
    objects, folders = listing(path, prefix, "/")
    names = {each["name"] for each in objects} | {folder.rstrip("/") for folder in folders}
    if not names and name:
        raise FileNotFoundError(path)
    return sorted({name[len(prefix) :] for name in names} - {""})


def walk(path: str) -> Iterator[tuple[str, int, int | None]]:
    """Name below `path`, bytes and CRC32C (None if the listing has none) of each object.

    Names that end with '/', and '' for `path` itself, are what Google's console makes for an empty
    folder.
    """
    bucket, name = split(path)
    prefix = f"{name}/" if name else ""
    for info in listing(path, prefix)[0]:
        length, crc = info.get("size"), crc32c(info.get("crc32c"))
        if length is None and not info["name"].endswith("/"):
            length, crc = digest(f"gs://{bucket}/{info['name']}")
        yield info["name"][len(prefix) :], int(length or 0), crc


# ---- reading -------------------------------------------------------------------------------------


def read_range(path: str, offset: int, length: int, generation: int | None = None) -> bytes:
    """A part of an object; shorter at its end. One request."""
    from google.api_core.exceptions import RequestRangeNotSatisfiable

    if length <= 0:
        return b""
    where = "/".join(split_object(path))
    try:
        return bytes(
            _tried("cat_file", where, start=offset, end=offset + length, generation=generation)
        )
    except RequestRangeNotSatisfiable:
        return b""
    except Exception as error:
        raise read_error(error, path) from error


def open_read(path: str) -> IO[bytes]:
    """An object as a file, in the generation that is there now."""
    from fsspec.spec import AbstractBufferedFile

    info = stat(path)
    _check_plain(info.get("contentEncoding"))
    now = generation(path, info)

    class Reader(AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            data = read_range(path, start, end - start, now)
            if len(data) < end - start:
                raise ShortError(f"{end - start} bytes asked for, {len(data)} got")
            return data

    return io.BufferedReader(Reader(None, path, block_size=_BLOCK, size=size(path, info)))
