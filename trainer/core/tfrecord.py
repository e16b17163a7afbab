"""TFRecord files: length, checksum, payload, checksum, again and again; without TensorFlow.

The format has been frozen for years. Programs that must stay small and start fast use it, and those
that would rather not go through TensorFlow's file systems. The tests hold it against TensorFlow's
own reader.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

import google_crc32c

from trainer.core.errors import DataError

_MAX_RECORD = 1 << 30
_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
OVERHEAD = _HEADER.size + _CHECKSUM.size
"""Bytes that a frame adds to a payload."""


def checksum(data: bytes) -> int:
    """CRC32C."""
    return int(google_crc32c.value(data))


def _masked_crc(data: bytes) -> int:
    crc = checksum(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """One record as it lies in the file: length, its checksum, payload, its checksum."""
    length = struct.pack("<Q", len(payload))
    return b"".join(
        (
            length,
            _CHECKSUM.pack(_masked_crc(length)),
            payload,
            _CHECKSUM.pack(_masked_crc(payload)),
        )
    )


def read_records(file: IO[bytes], offset: int = 0) -> Iterator[bytes]:
    """The payloads of a file's records from a record's start on, each checked.

    Raises:
      DataError: with the reason alone; the caller knows the shard and the record's number.
    """
    file.seek(offset)
    while header := file.read(_HEADER.size):
        if len(header) < _HEADER.size:
            raise DataError("the file ends in the middle of it")
        length, checksum = _HEADER.unpack(header)
        if checksum != _masked_crc(header[:8]) or length > _MAX_RECORD:
            raise DataError("its length is damaged")
        payload = file.read(length + _CHECKSUM.size)
        if len(payload) < length + _CHECKSUM.size:
            raise DataError("the file ends in the middle of it")
        if _CHECKSUM.unpack(payload[length:])[0] != _masked_crc(payload[:length]):
            raise DataError("its checksum is wrong")
        yield payload[:length]


def whole_records(content: bytes) -> Iterator[bytes]:
    """The payloads of the records that are whole; what lies between them is passed over."""
    place = 0
    while place + OVERHEAD <= len(content):
        length, expected = _HEADER.unpack_from(content, place)
        if expected != _masked_crc(content[place : place + 8]):
            place += 1  # a damaged length hides where the next record starts
            continue
        start, end = place + _HEADER.size, place + _HEADER.size + length
        if end + _CHECKSUM.size > len(content):
            return
        if _CHECKSUM.unpack_from(content, end)[0] == _masked_crc(content[start:end]):
            yield content[start:end]
        place = end + _CHECKSUM.size


def scan_records(content: bytes) -> list[tuple[int, bytes | str]]:
    """The offset of each record in a series of them, and its payload or its fault.

    A damaged length hides where the next record starts: what comes after it is not told apart, and
    the list ends there.
    """
    found: list[tuple[int, bytes | str]] = []
    place = 0
    while place < len(content):
        start = place
        header = content[start : start + _HEADER.size]
        place += _HEADER.size
        if len(header) < _HEADER.size:
            return [*found, (start, "the file ends in the middle of it")]
        length, expected = _HEADER.unpack(header)
        if expected != _masked_crc(header[:8]) or length > _MAX_RECORD:
            return [*found, (start, "its length is damaged")]
        payload = content[place : place + length]
        mark = content[place + length : place + length + _CHECKSUM.size]
        place += length + _CHECKSUM.size
        if len(mark) < _CHECKSUM.size:
            return [*found, (start, "the file ends in the middle of it")]
        sound = _CHECKSUM.unpack(mark)[0] == _masked_crc(payload)
        found.append((start, payload if sound else "its checksum is wrong"))
    return found
