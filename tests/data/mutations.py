"""Damage of every sort to small images, drawn by a seed: what disks, programs and people do."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.data import kinds
from tests.data.independent import SIGNATURE, chunk, chunks

Rng = np.random.Generator
_BIG = zlib.compress(bytes(2 << 20))  # unpacks to more than what decoders allow for metadata


def _bytes(rng: Rng, most: int) -> bytes:
    return rng.bytes(int(rng.integers(1, most + 1)))


def _pick(rng: Rng, choices: list) -> Any:
    return choices[int(rng.integers(len(choices)))]


# ---- any bytes -----------------------------------------------------------------------------------


def _truncate(rng: Rng, data: bytes) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def _cut_a_few(rng: Rng, data: bytes) -> bytes:
    return data[: -int(rng.integers(1, 40))]


def _flip(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        out[int(rng.integers(len(out)))] ^= int(rng.integers(1, 256))
    return bytes(out)


def _flip_bit(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _flip_header(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    out[int(rng.integers(min(64, len(out))))] = int(rng.integers(256))
    return bytes(out)


def _insert(rng: Rng, data: bytes) -> bytes:
    place = int(rng.integers(len(data)))
    return data[:place] + _bytes(rng, 16) + data[place:]


def _delete(rng: Rng, data: bytes) -> bytes:
    place = int(rng.integers(len(data)))
    return data[:place] + data[place + int(rng.integers(1, 16)) :]


def _repeat(rng: Rng, data: bytes) -> bytes:
    place = int(rng.integers(len(data)))
    piece = data[place : place + int(rng.integers(1, 64))]
    return data[:place] + piece + data[place:]


def _zero(rng: Rng, data: bytes) -> bytes:
    place, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
    return data[:place] + bytes(len(data[place : place + length])) + data[place + length :]


def _append(rng: Rng, data: bytes) -> bytes:
    return data + _bytes(rng, 100)


_ANY = [
    *(_truncate, _cut_a_few, _flip, _flip_bit, _flip_header),
    *(_insert, _delete, _repeat, _zero, _append),
]

# ---- PNG -----------------------------------------------------------------------------------------


def _png_parts(data: bytes) -> list[bytes]:
    return [struct.pack(">I", len(body)) + kind + body + crc for kind, body, crc in chunks(data)]


def _png_insert(rng: Rng, data: bytes) -> bytes:
    """A chunk more, well-formed, somewhere: known, unknown, critical or not, or far too large."""
    new = _pick(
        rng,
        [
            chunk(b"abCd", _bytes(rng, 50)),
            chunk(b"ABCD", _bytes(rng, 50)),
            chunk(b"tRNS", _bytes(rng, 6)),
            chunk(b"tRNS", bytes(2)),
            chunk(b"PLTE", rng.bytes(3 * int(rng.integers(1, 300)))),
            chunk(b"IDAT", b""),
            chunk(b"IDAT", _bytes(rng, 9)),
            chunk(b"IEND", b""),
            chunk(b"eXIf", _bytes(rng, 60)),
            chunk(b"eXIf", kinds.exif(int(rng.integers(1, 9)))),
            chunk(b"iCCP", b"p\0\0" + _BIG),
            chunk(b"zTXt", b"t\0\0" + _BIG),
            chunk(b"iTXt", b"t\0\1\0\0\0" + _BIG),
            chunk(b"tEXt", b"t\0" + bytes(2 << 20)),
            chunk(b"iCCP", _bytes(rng, 60)),
            chunk(b"sBIT", _bytes(rng, 5)),
            chunk(b"gAMA", _bytes(rng, 5)),
            chunk(b"sRGB", _bytes(rng, 2)),
            chunk(b"cHRM", _bytes(rng, 32)),
            chunk(b"cICP", _bytes(rng, 4)),
            chunk(b"bKGD", _bytes(rng, 6)),
            chunk(b"hIST", _bytes(rng, 6)),
            chunk(b"sPLT", _bytes(rng, 60)),
            chunk(b"acTL", struct.pack(">II", int(rng.integers(0, 4)), 0)),
            chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 5, 5, 2, 2, 1, 1, 2, 1)),
            chunk(b"fdAT", _bytes(rng, 30)),
        ],
    )
    parts = _png_parts(data)
    parts.insert(int(rng.integers(0, len(parts) + 1)), new)
    return SIGNATURE + b"".join(parts)


def _drop(rng: Rng, parts: list[bytes]) -> None:
    del parts[int(rng.integers(len(parts)))]


def _double(rng: Rng, parts: list[bytes]) -> None:
    parts.insert(int(rng.integers(len(parts) + 1)), _pick(rng, parts))


def _swap(rng: Rng, parts: list[bytes]) -> None:
    one, other = rng.integers(len(parts), size=2)
    parts[one], parts[other] = parts[other], parts[one]


def _png_arrange(rng: Rng, data: bytes) -> bytes:
    parts = _png_parts(data)
    _pick(rng, [_drop, _double, _swap])(rng, parts)
    return SIGNATURE + b"".join(parts)


def _png_edit(rng: Rng, data: bytes) -> bytes:
    """A chunk with another content and a right checksum, or with a wrong checksum alone."""
    found = list(chunks(data))
    n = int(rng.integers(len(found)))
    kind, body, crc = found[n]
    parts = _png_parts(data)
    if not body or rng.random() < 0.3:
        parts[n] = parts[n][:-4] + _flip_bit(rng, crc)
    else:
        parts[n] = chunk(kind, _pick(rng, [_flip, _flip_bit, _delete, _repeat])(rng, body))
    return SIGNATURE + b"".join(parts)


def _png_header(rng: Rng, data: bytes) -> bytes:
    parts = _png_parts(data)
    header = bytearray(parts[0][8:21])
    place = int(rng.integers(13))
    header[place] = int(_pick(rng, [0, 1, 2, 3, 4, 6, 8, 16, 19, 13, 255]))
    return SIGNATURE + chunk(b"IHDR", bytes(header)) + b"".join(parts[1:])


def _png_stream(rng: Rng, data: bytes) -> bytes:
    """The pixels packed in another way: with more behind, less, in pieces, without a checksum."""
    found = list(chunks(data))
    stream = b"".join(body for kind, body, _ in found if kind == b"IDAT")
    rows = zlib.decompress(stream)
    stream = _pick(
        rng,
        [
            stream + _bytes(rng, 9),
            stream[:-4],
            stream[:-2],
            stream[:-4] + rng.bytes(4),
            zlib.compress(rows + _bytes(rng, 30)),
            zlib.compress(rows[: -int(rng.integers(1, 30))]),
            zlib.compress(rows, 0),
            zlib.compress(rows, 9),
            zlib.compress(_flip(rng, rows)),
            zlib.compress(rows) + zlib.compress(rows),
        ],
    )
    size = int(rng.integers(1, len(stream) + 1))
    new = [chunk(b"IDAT", stream[n : n + size]) for n in range(0, len(stream), size)]
    parts = _png_parts(data)
    first = [kind for kind, _, _ in found].index(b"IDAT")
    return SIGNATURE + b"".join([*parts[:first], *new, chunk(b"IEND", b"")])


# ---- JPEG ----------------------------------------------------------------------------------------


def _jpeg_parts(data: bytes) -> list[bytes]:
    """The segments after the first marker; scans with their pixels; the last is the end."""
    parts, start = [], 2
    while start + 4 <= len(data):
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if data[start + 1] == 0xDA:
            while data[end] != 0xFF or data[end + 1] == 0 or 0xD0 <= data[end + 1] <= 0xD7:
                end += 1
        parts.append(data[start:end])
        start = end
    return [*parts, data[start:]]


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _jpeg_insert(rng: Rng, data: bytes) -> bytes:
    new = _pick(
        rng,
        [
            _segment(0xE0 + int(rng.integers(16)), _bytes(rng, 60)),
            _segment(0xFE, _bytes(rng, 60)),
            _segment(0xE1, b"Exif\0\0" + _bytes(rng, 60)),
            _segment(0xE1, b"Exif\0\0" + kinds.exif(int(rng.integers(1, 9)))),
            _segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60000)) * 35,
            _segment(0xE2, b"MPF\0" + _bytes(rng, 60)),
            _segment(0xED, b"Photoshop 3.0\0" + _bytes(rng, 60)),
            _segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([int(rng.integers(4))])),
            _segment(0xE0, b"JFIF\0\2\1\0\0\1\0\1\0\0"),
            _segment(0xDD, struct.pack(">H", int(rng.integers(9)))),
            _segment(0xDB, b"\0" + rng.bytes(64)),
            bytes([0xFF, 0xD0 + int(rng.integers(8))]),
            b"\xff" * int(rng.integers(1, 9)),
            b"\xff\xd8",
            b"\xff\xd9",
            _bytes(rng, 9),
        ],
    )
    parts = _jpeg_parts(data)
    parts.insert(int(rng.integers(0, len(parts))), new)
    return b"\xff\xd8" + b"".join(parts)


def _jpeg_arrange(rng: Rng, data: bytes) -> bytes:
    parts = _jpeg_parts(data)
    _pick(rng, [_drop, _double, _swap])(rng, parts)
    return b"\xff\xd8" + b"".join(parts)


def _jpeg_edit(rng: Rng, data: bytes) -> bytes:
    """One segment, its length kept."""
    parts = _jpeg_parts(data)
    n = int(rng.integers(len(parts) - 1))
    end = 4 + int.from_bytes(parts[n][2:4], "big") - 2
    body = bytearray(parts[n][4:end])
    body[int(rng.integers(min(20, len(body))))] = int(
        _pick(rng, [0, 1, 2, 3, 4, 0x11, 0x21, 0x12, 0x22, 0x41, 8, 12, 63, 255])
    )
    parts[n] = parts[n][:4] + bytes(body) + parts[n][end:]
    return b"\xff\xd8" + b"".join(parts)


def _jpeg_marker(rng: Rng, data: bytes) -> bytes:
    parts = _jpeg_parts(data)
    n = int(rng.integers(len(parts)))
    parts[n] = b"\xff" + bytes([int(rng.integers(0xC0, 0x100))]) + parts[n][2:]
    return b"\xff\xd8" + b"".join(parts)


def _jpeg_scan(rng: Rng, data: bytes) -> bytes:
    """The pixels of a scan cut or changed, the file's end as it should be."""
    parts = _jpeg_parts(data)
    scans = [n for n, part in enumerate(parts) if part[1] == 0xDA]
    n = int(_pick(rng, scans))
    start = 2 + int.from_bytes(parts[n][2:4], "big")
    head, body = parts[n][:start], parts[n][start:]
    if rng.random() < 0.2:
        del parts[n + 1 : -1]
    else:
        change = _pick(rng, [_truncate, _cut_a_few, _flip, _flip_bit, _append, _insert, _delete])
        parts[n] = head + change(rng, body)
    return b"\xff\xd8" + b"".join(parts)


# ---- WebP ----------------------------------------------------------------------------------------


def _webp_parts(data: bytes) -> list[bytes]:
    parts, start = [], 12
    while start + 8 <= len(data):
        length = struct.unpack("<I", data[start + 4 : start + 8])[0]
        end = start + 8 + length + length % 2
        parts.append(data[start:end])
        start = end
    return parts


def _riff(parts: list[bytes]) -> bytes:
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _webp_arrange(rng: Rng, data: bytes) -> bytes:
    parts = _webp_parts(data)
    _pick(rng, [_drop, _double, _swap])(rng, parts)
    return _riff(parts)


def _webp_insert(rng: Rng, data: bytes) -> bytes:
    """Metadata, with the extended header that it needs."""
    body = _pick(
        rng,
        [
            b"EXIF" + struct.pack("<I", 60) + rng.bytes(60),
            b"EXIF" + struct.pack("<I", 2 << 20) + bytes(2 << 20),
            b"ICCP" + struct.pack("<I", 2 << 20) + bytes(2 << 20),
            b"XMP " + struct.pack("<I", 60) + rng.bytes(60),
            b"abcd" + struct.pack("<I", 60) + rng.bytes(60),
            b"ALPH" + struct.pack("<I", 60) + rng.bytes(60),
            b"ANIM" + struct.pack("<I", 6) + bytes(6),
        ],
    )
    parts = _webp_parts(data)
    if parts[0][:4] != b"VP8X" and rng.random() < 0.8:
        size = (kinds.WIDTH - 1).to_bytes(3, "little") + (kinds.HEIGHT - 1).to_bytes(3, "little")
        flags = int(_pick(rng, [0, 2, 4, 8, 12, 16, 32, 44, 255]))
        parts.insert(0, b"VP8X" + struct.pack("<II", 10, flags) + size)
    parts.insert(int(rng.integers(1, len(parts) + 1)), body)
    return _riff(parts)


def _webp_size(rng: Rng, data: bytes) -> bytes:
    size = struct.unpack("<I", data[4:8])[0] + int(rng.integers(-40, 40))
    return data[:4] + struct.pack("<I", max(0, size)) + data[8:]


# ---- TIFF ----------------------------------------------------------------------------------------

# Not 254, the kind of page: tifffile stops at a wrong one, and the pixels do not depend on it.
_TAGS = [256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 282, 284, 305, 317, 320]
_TAGS += [322, 323, 324, 325, 330, 332, 338, 339, 347, 512, 530, 700, 33723, 34377, 34665, 34675]


def _tiff_entries(data: bytes) -> tuple[str, int, int]:
    """The order of bytes, the number of tags, and where they start."""
    order = "<" if data[:1] == b"I" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0]
    return order, struct.unpack_from(order + "H", data, start)[0], start + 2


def _tiff_edit(rng: Rng, data: bytes) -> bytes:
    """One tag's name, type, count or value."""
    if data[2:4] not in {b"*\0", b"\0*"}:
        return _flip(rng, data)
    order, count, start = _tiff_entries(data)
    out = bytearray(data)
    entry = start + 12 * int(rng.integers(count))
    value = int(_pick(rng, [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 64, 255, 65535, 1 << 31]))
    which = int(rng.integers(5))
    if which == 0:
        struct.pack_into(order + "H", out, entry, int(_pick(rng, _TAGS)))
    elif which == 1:
        struct.pack_into(order + "H", out, entry + 2, int(rng.integers(0, 19)))
    elif which == 2:
        struct.pack_into(order + "I", out, entry + 4, value)
    elif struct.unpack_from(order + "H", out, entry + 2)[0] == 3:
        struct.pack_into(order + "H", out, entry + 8, value & 0xFFFF)
    else:
        struct.pack_into(order + "I", out, entry + 8, value)
    return bytes(out)


def _tiff_tags(rng: Rng, data: bytes) -> bytes:
    """A new directory: tags left out, repeated, or added, some of them far too large."""
    if data[2:4] not in {b"*\0", b"\0*"}:
        return _cut_a_few(rng, data)
    order, count, start = _tiff_entries(data)
    entries = [data[start + 12 * n : start + 12 * n + 12] for n in range(count)]
    out = bytearray(data)
    way = int(rng.integers(6))
    if way == 0:
        _drop(rng, entries)
    elif way == 1:
        _double(rng, entries)
    elif way == 2:
        _swap(rng, entries)
    else:
        tag = int(_pick(rng, _TAGS))
        kind = int(rng.integers(0, 14))
        size = int(_pick(rng, [1, 3, 60, 2 << 20]))
        entries.append(struct.pack(order + "HHII", tag, kind, size, len(out)))
        out += rng.bytes(size)
        entries.sort()
    more = int(rng.integers(1, len(out))) if rng.random() < 0.1 else 0
    struct.pack_into(order + "I", out, 4, len(out))
    out += struct.pack(order + "H", len(entries)) + b"".join(entries)
    return bytes(out + struct.pack(order + "I", more))


# ---- BMP -----------------------------------------------------------------------------------------


def _bmp_edit(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    place, code = _pick(
        rng,
        [
            *((2, "I"), (10, "I"), (14, "I"), (18, "i"), (22, "i"), (26, "H")),
            *((28, "H"), (30, "I"), (34, "I"), (46, "I"), (50, "I"), (54, "I"), (66, "I")),
        ],
    )
    value = _pick(rng, [0, 1, 2, 3, 4, 8, 12, 16, 24, 32, 40, 54, 108, 124, 256, -18, 65535])
    most = 0xFFFF if code == "H" else 0xFFFFFFFF
    struct.pack_into("<" + code.upper(), out, place, int(value) & most)
    return bytes(out)


_FORMATS: dict[str, tuple[Callable[[], dict[str, bytes]], list]] = {
    "PNG": (kinds.pngs, [_png_insert, _png_arrange, _png_edit, _png_header, _png_stream]),
    "JPEG": (kinds.jpegs, [_jpeg_insert, _jpeg_arrange, _jpeg_edit, _jpeg_marker, _jpeg_scan]),
    "WebP": (kinds.webps, [_webp_arrange, _webp_insert, _webp_size]),
    "TIFF": (kinds.tiffs, [_tiff_edit, _tiff_tags]),
    "BMP": (kinds.bmps, [_bmp_edit]),
}
FORMATS = tuple(_FORMATS)


class Mutations:
    """Damaged images by their index: the format goes round, half the damage is made for it."""

    def __init__(self) -> None:
        self._sources = {name: list(make().items()) for name, (make, _) in _FORMATS.items()}

    def make(self, index: int) -> tuple[str, str, bytes]:
        """The format, a line on what was done, and the file."""
        rng = np.random.default_rng(index)
        image_format = FORMATS[index % len(FORMATS)]
        name, data = _pick(rng, self._sources[image_format])
        own = _FORMATS[image_format][1]
        change = _pick(rng, own if rng.random() < 0.5 else _ANY)
        return image_format, f"{index}: {name}, {change.__name__}", change(rng, data)
