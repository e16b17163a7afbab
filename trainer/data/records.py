"""The record files: `tf.train.Example` messages in TFRecord frames, without TensorFlow.

The converter writes millions of records from processes that must stay small and start fast, so the
message, frozen for years, is written here directly. The tests hold it against TensorFlow's own
reader.
"""

from __future__ import annotations

from typing import IO

import google_crc32c

from trainer.core import tfrecord
from trainer.data.images import EncodedImage


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are ten bytes, as int64 on the wire
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(field: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def encode_example(features: dict[str, bytes | int]) -> bytes:
    """A serialized tf.train.Example with one value for each feature, in the order given."""
    entries = bytearray()
    for key, value in features.items():
        if isinstance(value, int):
            feature = _message(3, _message(1, _varint(value)))
        else:
            feature = _message(1, _message(1, value))
        entries += _message(1, _message(1, key.encode()) + _message(2, feature))
    return _message(1, bytes(entries))


def encode_record(image: EncodedImage, label: int, source: str) -> bytes:
    """The payload of one image's record.

    Args:
      image: the encoded image.
      label: class number, -1 if the data set has no labels.
      source: the path in the source.
    """
    return encode_example(
        {
            "image/class/label": label,
            "image/encoded": image.data,
            "image/format": image.format.encode(),
            "image/height": image.height,
            "image/source": source.encode("utf-8", "surrogateescape"),
            "image/width": image.width,
        }
    )


class ShardWriter:
    """Writes records to an open file, keeping what the manifest says about them.

    Attributes:
      offsets: where each record starts.
      bytes: length of the file so far.
      crc32c: checksum of the file so far.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.offsets: list[int] = []
        self.bytes = 0
        self.crc32c = 0

    def write(self, payload: bytes) -> None:
        """Adds a record."""
        record = tfrecord.frame(payload)
        self._file.write(record)
        self.offsets.append(self.bytes)
        self.bytes += len(record)
        self.crc32c = google_crc32c.extend(self.crc32c, record)
