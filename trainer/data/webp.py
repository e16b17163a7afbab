"""WebP files, chunk by chunk: what of them the pixels need."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.core.errors import DataError

_MAX_CHUNKS = 10_000
_ALPHA = 0x10  # in the flags of the extended header


@dataclass(frozen=True)
class Webp:
    """Contents of a WebP file's chunks.

    Attributes:
      exif: the EXIF block, b'' if there is none.
      data: a WebP of the same pixels without anything else.
    """

    exif: bytes
    data: bytes


def is_webp(data: bytes) -> bool:
    """Whether a file starts as a WebP does."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def read(data: bytes, max_pixels: int) -> Webp:
    """Looks through a WebP file, without decoding it.

    Metadata is left out, and so nothing in it can do harm.

    Args:
      data: the file.
      max_pixels: more are refused.

    Raises:
      DataError: with the reason alone. It is damaged, an animation, or says two things at once.
    """
    chunks = list(_chunks(data))
    frames = sum(kind == b"ANMF" for kind, _ in chunks)
    if frames:
        raise DataError(f"an animation: it has {frames} frames; only single images are taken")
    kinds = [kind for kind, _ in chunks]
    needed = [each for each in chunks if each[0] in {b"VP8X", b"ALPH", b"VP8 ", b"VP8L"}]
    extended = [body for kind, body in needed if kind == b"VP8X"]
    order = [kind for kind, _ in needed]
    flagged = bool(extended and extended[0][:1] and extended[0][0] & _ALPHA)
    if not kinds or kinds[0] not in {b"VP8X", b"VP8 ", b"VP8L"}:
        raise DataError("damaged: it does not start with its pixels or a header")
    if order[len(extended) :] not in ([b"VP8 "], [b"VP8L"], [b"ALPH", b"VP8 "]):
        raise DataError("damaged: its chunks are not those of one image")
    width, height, alpha = _frame(*needed[-1])
    alpha = alpha or b"ALPH" in order
    if not width or not height:
        raise DataError(f"damaged: it has {width}x{height} pixels")
    if width * height > max_pixels:
        raise DataError(f"it has {width}x{height} pixels; the limit is {max_pixels}")
    if extended:
        size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        if len(extended) > 1 or extended[0][4:10] != size:
            raise DataError("damaged: its header has another size than its pixels")
        needed[0] = (b"VP8X", bytes([_ALPHA * alpha, 0, 0, 0]) + size)
    if b"ALPH" in order and not extended:
        raise DataError("damaged: its alpha has no header")
    if extended and flagged != alpha:
        raise DataError("damaged: its header and its pixels disagree on whether it has alpha")
    body = b"WEBP" + b"".join(_encoded(kind, body) for kind, body in needed)
    return Webp(
        exif=next((body for kind, body in chunks if kind == b"EXIF"), b""),
        data=b"RIFF" + struct.pack("<I", len(body)) + body,
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """All chunks: kind and body."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if len(data) < end:
        raise DataError("damaged: it is truncated within its pixels")
    start = 12
    for _ in range(_MAX_CHUNKS):
        if start + 8 > end:
            return
        kind, length = struct.unpack_from("<4sI", data, start)
        start += 8
        if start + length > end:
            raise DataError(f"damaged: its chunk at byte {start - 8} is longer than the file")
        yield kind, data[start : start + length]
        start += length + length % 2
    raise DataError(f"it has more than {_MAX_CHUNKS} chunks")


def _frame(kind: bytes, body: bytes) -> tuple[int, int, bool]:
    """Width, height and whether there is alpha, of the chunk with the pixels."""
    if len(body) < 10:
        raise DataError("damaged: it is truncated within its pixels")
    if kind == b"VP8L":
        packed = int.from_bytes(body[1:5], "little")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1, bool(packed >> 28 & 1)
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF, False


def _encoded(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
