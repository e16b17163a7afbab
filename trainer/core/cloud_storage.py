"""Files on Cloud Storage, for `trainer.core.storage`: all that must not go wrong unseen.

Two clients send the requests. Listings and plain reads are gcsfs's (`cloud_reading`, which says
why). google-cloud-storage (here) has what gcsfs cannot do: writes, copies and removals on the
condition that an object is of a generation still, composing, and contents compared with Cloud
Storage's CRC32C on both ways. What was carried out although its answer got lost is not taken for a
failure. Both log in once, try again and fail in the same words (`cloud_requests`).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import re
import secrets
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import IO, Any, TypeVar
from urllib.parse import quote

import google_crc32c

from trainer.core import cloud_reading, cloud_requests
from trainer.core.cloud_reading import crc32c
from trainer.core.cloud_requests import ShortError, missing, split, split_object

REWRITE_SECONDS = 1.0  # an object written more often is answered 429
_AT_ONCE = 8
_BLOCK = 1 << 24
_LARGE = 8 << 20  # from which on an upload takes several requests
_CHUNK = 1 << 25  # of each of them; a multiple of 256 KiB
_BYTES = "application/octet-stream"

T = TypeVar("T")
_Content = TypeVar("_Content", bytes, str)  # itself, or the name of a file with it on the disk


def _tried(request: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The result of a request that may be made again and again."""
    options = {"retry": None, "timeout": cloud_requests.REQUEST_SECONDS, **kwargs}
    return cloud_requests.tried(functools.partial(request, *args, **options))


def _blob(path: str, generation: int | None = None) -> Any:
    bucket, name = split_object(path)
    return cloud_requests.client().bucket(bucket).blob(name, generation=generation)


# ---- reading -------------------------------------------------------------------------------------


def read(path: str) -> tuple[bytes, int]:
    """An object's content and generation."""
    data, blob = _download(path, _whole)
    while blob.generation is None:  # the answer to a read had none: read that which there is now
        generation = cloud_reading.generation(path)
        try:
            return _download(path, _whole, generation)[0], generation
        except FileNotFoundError:
            continue  # it has changed meanwhile
    return data, int(blob.generation)


def get_file(path: str, local: str) -> None:
    """Copies an object to the disk."""

    def download(blob: Any, **options: Any) -> str:
        with open(local, "wb") as file:
            _into(file, blob, **options)
        return local

    _download(path, download)


def _whole(blob: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    _into(buffer, blob, **options)
    return buffer.getvalue()


def _into(file: IO[bytes], blob: Any, **options: Any) -> None:
    """Writes an object's content to a file; after a fault the rest of it, of the same generation."""
    resumed = functools.partial(cloud_requests.tried, progress=file.tell)
    # The client calls `retry` with what sends the request, and then what that returns.
    retry = functools.partial(functools.partial, resumed)
    blob.download_to_file(file, checksum="crc32c", **options | {"retry": retry})


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
                _note_no_checksums(split(path)[0])
            _compare(path, _sums(content), known)
        return content, blob

    try:
        return _tried(once)
    except Exception as error:
        raise cloud_reading.read_error(error, path) from error


@functools.cache
def _note_no_checksums(bucket: str) -> None:
    text = f"note: gs://{bucket} tells no checksums; of what is read there only sizes are compared"
    print(text, file=sys.stderr, flush=True)


def _sums(content: _Content) -> tuple[int, int]:
    """Length and CRC32C of bytes, or of the file of that name on the disk."""
    if isinstance(content, bytes):
        return len(content), google_crc32c.value(content)
    length = crc = 0
    with open(content, "rb") as file:
        while block := file.read(_BLOCK):
            length, crc = length + len(block), google_crc32c.extend(crc, block)
    return length, crc


def _compare(path: str, sums: tuple[int, int], blob: Any) -> None:
    """Refuses bytes that are not those of an object, as far as that is known."""
    for name, here, there in zip(
        ("bytes", "CRC32C"), sums, (blob.size, crc32c(blob.crc32c)), strict=True
    ):
        if there is not None and here != there:
            raise ShortError(f"{path} has {name} {there}, {here} came over")


# ---- writing -------------------------------------------------------------------------------------


def put(path: str, data: bytes) -> None:
    """Writes an object, over an older one if there is one."""
    _upload(path, data)


def put_file(path: str, local: str) -> None:
    """Writes an object from a file on the disk."""
    _upload(path, local)


def put_new_file(path: str, local: str) -> bool:
    """Writes an object from a file on the disk if there is none; whether there was none."""
    from google.api_core.exceptions import PreconditionFailed

    try:
        _upload(path, local, if_generation_match=0)
    except PreconditionFailed:
        return False
    return True


def _upload(path: str, content: _Content, if_generation_match: int | None = None) -> int | None:
    """Writes an object. The store gets the CRC32C, and must compare.

    Args:
      path: the object.
      content: its bytes, or the file of that name on the disk.
      if_generation_match: that the object must have still, 0 if there must be none; None: whatever.

    Returns:
      The new generation, None if the answer doesn't hold it.
    """
    sums, attempts = _sums(content), 0

    def upload(**options: Any) -> int | None:
        nonlocal attempts
        attempts += 1
        blob = _blob(path)
        blob.crc32c = base64.b64encode(sums[1].to_bytes(4, "big")).decode()
        if sums[0] > _LARGE:
            ask = attempts % 2 == 0
            info = _send_in_parts(path, content, sums[0], blob.crc32c, if_generation_match, ask=ask)
            blob._set_properties(info)
        else:
            is_file = isinstance(content, str)
            send = blob.upload_from_filename if is_file else blob.upload_from_string
            send(
                content,
                content_type=_BYTES,
                checksum=None,
                if_generation_match=if_generation_match,
                **options,
            )
        _compare(path, sums, blob)
        return None if blob.generation is None else int(blob.generation)

    try:
        return _tried(upload)
    except Exception as error:
        raise missing(error, path) from error


def _send_in_parts(
    path: str,
    content: _Content,
    size: int,
    crc: str,
    if_generation_match: int | None,
    *,
    ask: bool,
) -> dict[str, Any]:
    """Writes a large object. After a fault it goes on with the part that has failed.

    Google's client does so only for faults that are answers, and counts the time for tries from the
    first part on.

    Args:
      path: the object.
      content: its bytes, or the file of that name on the disk.
      size, crc: of the content, the checksum as Cloud Storage writes it.
      if_generation_match: see `_upload`.
      ask: after a fault ask first how much is stored. Cloud Storage answers, and passes over what
        is sent twice; other servers do only one of both.

    Returns:
      The object's description.

    Raises:
      ShortError: the store has forgotten the upload, or something else than the content; it can be
        begun anew.
    """
    from google.api_core.exceptions import GoogleAPICallError, from_http_response

    client = cloud_requests.client()
    bucket, name = split_object(path)

    def request(method: str, url: str, allowed: tuple[int, ...], **options: Any) -> Any:
        answer = client._http.request(
            method, url, timeout=cloud_requests.REQUEST_SECONDS, allow_redirects=False, **options
        )
        if answer.status_code not in allowed:
            raise from_http_response(answer)
        return answer

    # What is None requests leaves out.
    query = {"uploadType": "resumable", "ifGenerationMatch": if_generation_match}
    begun = cloud_requests.tried(
        lambda: request(
            "POST",
            f"{client.api_endpoint}/upload/storage/v1/b/{quote(bucket, safe='')}/o",
            (200, 201),
            params=query,
            json={"name": name, "crc32c": crc, "contentType": _BYTES},
            headers={"X-Upload-Content-Type": _BYTES, "X-Upload-Content-Length": str(size)},
        )
    )
    session, start = begun.headers["Location"], 0
    sure, faults = True, 0  # whether it is known how much is stored
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:

        def part() -> dict[str, Any] | None:
            """Sends a part, or asks; the object's description if all of it is stored."""
            nonlocal start, sure, faults
            data, where = b"", "bytes */*"
            if sure or not ask:
                file.seek(start)
                data = file.read(_CHUNK)
                where = f"bytes {start}-{start + len(data) - 1}/{size}"
            sure, faults = False, faults + 1
            answer = request(
                "PUT", session, (200, 201, 308), data=data, headers={"Content-Range": where}
            )
            sure, faults = True, faults - 1
            if answer.status_code != 308:
                return dict(answer.json())
            found = re.fullmatch(r"bytes=0-(\d+)", answer.headers.get("Range", ""))
            start = int(found[1]) + 1 if found else 0
            return None

        while True:
            try:
                info = cloud_requests.tried(part, progress=lambda: start)
            except GoogleAPICallError as error:
                # After faults another content may have been put together than has this checksum.
                if error.code not in (404, 410) and not (faults > 1 and error.code in (400, 412)):
                    raise
                raise ShortError(f"the upload of {path} broke off ({error.message})") from error
            if info is not None:
                return info


def put_if(path: str, data: bytes, generation: int) -> int | None:
    """Writes an object if it is of this generation still; 0: if there is none.

    Returns:
      The new generation; None if somebody else was faster.
    """
    from google.api_core.exceptions import PreconditionFailed

    try:
        written = _upload(path, data, if_generation_match=generation)
    except PreconditionFailed:
        pass  # unless it was us, and the answer got lost
    else:
        if written is not None:
            return written
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
        return tries > 1 and not cloud_reading.isfile(path)  # it was us, and the answer got lost
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

    folder, _, name = path.rpartition("/")
    # Not the object's name in it: TensorBoard reads every file with `tfevents` in its name. And one
    # of its own each time: another job may be adding to the object that has replaced this one.
    tail_path = f"{folder}/{tail_name(name, secrets.token_hex(4))}"
    _upload(tail_path, data)
    tail = _blob(tail_path)
    before, length, crc = state
    expected = length + len(data), google_crc32c.extend(crc, data)
    blob = _blob(path)
    try:
        # Composed a second time, if the first answer got lost, it would be there twice.
        _tried(blob.compose, [_blob(path), tail], if_generation_match=before)
        after = blob.generation
    except (NotFound, PreconditionFailed):
        after = None
    if after is None:
        # It was us, and the answer got lost or holds no generation?
        with contextlib.suppress(FileNotFoundError):
            info = cloud_reading.stat(path)
            if cloud_reading.digest(path, info) == expected:
                after = cloud_reading.generation(path, info)
    _delete([tail.name], path)
    return None if after is None else (int(after), *expected)


def tail_name(name: str, token: str) -> str:
    """The description of the object that is appended to another one."""
    return f".{zlib.crc32(name.encode()):08x}.{token}.tail"


def shorten(path: str, length: int, generation: int) -> bool:
    """Writes an object of this generation anew with its first bytes; whether it was of this one."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    try:
        info = cloud_reading.stat(path)
        if cloud_reading.generation(path, info) != generation:
            return False
        if length == cloud_reading.size(path, info):
            expected = cloud_reading.digest(path, info)
            _copy(_blob(path), _blob(path), if_generation_match=generation)
            return True
        with tempfile.NamedTemporaryFile() as file:
            for start in range(0, length, _BLOCK):
                block = min(_BLOCK, length - start)
                file.write(cloud_reading.read_range(path, start, block, generation))
            file.flush()
            expected = _sums(file.name)
            _upload(path, file.name, if_generation_match=generation)
    except PreconditionFailed:
        with contextlib.suppress(FileNotFoundError):
            return cloud_reading.digest(path) == expected  # it was us, and the answer got lost
        return False
    except (FileNotFoundError, NotFound):
        return False
    return True


def makedirs(path: str) -> None:
    """Nothing: there are no directories, only names with '/' in them."""
    split(path)


# ---- removing and renaming -----------------------------------------------------------------------


def _delete(names: Iterable[str], path: str) -> None:
    """Removes objects of a path's bucket; those that are not there are removed already."""
    from google.api_core.exceptions import NotFound

    bucket = cloud_requests.client().bucket(split(path)[0])

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
    _delete([split(path)[1]], path)


def remove_files(paths: Iterable[str]) -> None:
    """Removes objects of one bucket."""
    paths = list(paths)
    _delete([split(path)[1] for path in paths], paths[0])


def remove_tree(path: str) -> None:
    """Removes an object and all below it; nothing there is fine."""
    _delete(_below(path), path)


def _below(path: str) -> list[str]:
    _, name = split_object(path)
    found = (info["name"] for info in cloud_reading.listing(path, name)[0])
    return [each for each in found if each == name or each.startswith(f"{name}/")]


def rename(source: str, target: str) -> bool:
    """Copies an object, or all below, within Cloud Storage, then removes the old.

    Returns:
      Whether all could be copied; False if there was an object of that name with another content.
    """
    from google.api_core.exceptions import PreconditionFailed

    _, old = split(source)
    bucket, new = split(target)
    here, there = (
        cloud_requests.client().bucket(split(source)[0]),
        cloud_requests.client().bucket(bucket),
    )
    names = _below(source)
    if not names:
        raise FileNotFoundError(source)

    def copy(name: str) -> None:
        blob, copied = here.blob(name), there.blob(new + name[len(old) :])
        try:
            _copy(blob, copied, if_generation_match=0)
        except PreconditionFailed:
            urls = (f"gs://{each.bucket.name}/{each.name}" for each in (blob, copied))
            if len({cloud_reading.digest(url) for url in urls}) > 1:
                raise
            # It was us, and the answer got lost.

    try:
        _each(copy, names)
    except PreconditionFailed:
        return False
    except Exception as error:
        raise missing(error, target) from error
    _delete(names, source)
    return True


def _copy(blob: Any, copied: Any, **preconditions: Any) -> None:
    token = None
    while True:  # large ones are copied in several requests
        token, _, _ = _tried(copied.rewrite, blob, token=token, **preconditions)
        if token is None:
            return
