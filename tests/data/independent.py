"""What a source image's pixels are by decoders that the converter doesn't use.

imagecodecs has builds of libpng, libjpeg-turbo and libwebp of its own and a BMP decoder; tifffile
reads TIFF in Python. The rules for what is no 8-bit grey or RGB are written here once more: 16 bits
give their 8 highest, CMYK becomes RGB without a profile, and so on.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG's chunk."""
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """A PNG's chunks as far as they go: kind, body, checksum."""
    start = len(SIGNATURE)
    while start + 8 <= len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        end = start + 8 + length
        yield data[start + 4 : start + 8], data[start + 8 : end], data[end : end + 4]
        start = end + 4


def pixels(data: bytes) -> np.ndarray:
    """uint8 [height, width, channels], upright; any exception where it cannot be decoded."""
    if data.startswith(SIGNATURE):
        found, exif = _png(data)
    elif data.startswith(b"\xff\xd8"):
        found, exif = _jpeg(data)
    elif data.startswith(b"RIFF"):
        found, exif = _webp(data)
    elif data.startswith(b"BM"):
        found, exif = _bmp(data), b""
    else:
        return _tiff(data)
    if found.ndim == 2:
        found = found[..., None]
    return upright(found, _exif_orientation(exif))


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """By the definition of the tag: where the first row and column of what is stored are."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in {3, 4, 7, 8}:
        image = image[::-1]
    if orientation in {2, 3, 6, 7}:
        image = image[:, ::-1]
    return image


def _exif_orientation(exif: bytes) -> int:
    if not exif:
        return 1
    found = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.load(exif)
        orientation = found.get(0x0112, 1)
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _png(data: bytes) -> tuple[np.ndarray, bytes]:
    """libpng stops at wrong checksums and where the end is missing; it gets what it wants."""
    repaired, exif = [SIGNATURE], b""
    for kind, body, crc in chunks(data):
        sound = crc == struct.pack(">I", zlib.crc32(kind + body))
        if kind == b"IEND":
            break
        if kind in {b"IHDR", b"PLTE", b"tRNS", b"IDAT"} and (sound or kind == b"IDAT"):
            repaired.append(chunk(kind, body))
        if kind == b"eXIf" and sound and not exif:
            exif = body
    found = imagecodecs.png_decode(b"".join([*repaired, chunk(b"IEND", b"")]))
    return (found if found.dtype == np.uint8 else (found >> 8).astype(np.uint8)), exif


def _jpeg(data: bytes) -> tuple[np.ndarray, bytes]:
    found = imagecodecs.jpeg8_decode(data)
    if found.ndim == 3 and found.shape[2] == 4:
        found = _rgb_of_cmyk(255 - found)
    header = data[: data.find(b"\xff\xda")]
    segments = re.finditer(rb"\xff\xe1(..)(?=Exif\0\0)", header, re.DOTALL)
    first = next(segments, None)
    length = struct.unpack(">H", first[1])[0] - 2 if first else 0
    return found, data[first.end() : first.end() + length] if first else b""


def _bmp(data: bytes) -> np.ndarray:
    if struct.unpack_from("<H", data, 28)[0] > 8:
        data = data[:46] + bytes(4) + data[50:]  # a proposed palette is none of its business
    return imagecodecs.bmp_decode(data)


def _webp(data: bytes) -> tuple[np.ndarray, bytes]:
    """libwebp refuses files for their metadata and reads on behind cut pixels; it gets neither."""
    start, end = 12, 8 + struct.unpack_from("<I", data, 4)[0]
    parts, exif = [], b""
    while start + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, start)
        part = data[start : start + 8 + length] + b"\0" * (length % 2)
        if kind == b"VP8X":
            part = part[:8] + bytes([part[8] & 0x10]) + part[9:]  # alpha, and nothing else
        if kind in {b"VP8X", b"ALPH", b"VP8 ", b"VP8L"}:
            parts.append(part)
        if kind == b"EXIF" and not exif:
            exif = part[8 : 8 + length]
        start += len(part)
    body = b"WEBP" + b"".join(parts)
    return imagecodecs.webp_decode(b"RIFF" + struct.pack("<I", len(body)) + body), exif


def _rgb_of_cmyk(ink: np.ndarray) -> np.ndarray:
    """RGB of uint8 [H, W, 4], 255 for full ink."""
    paper = 255 - ink.astype(float)
    return np.rint(paper[..., :3] * paper[..., 3:] / 255).astype(np.uint8)


def _tiff(data: bytes) -> np.ndarray:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if len(file.pages) != 1:
            raise ValueError("more than one page")
        page = file.pages[0]
        found = page.asarray()
        axes = page.axes
        photometric, bits = int(page.photometric), page.bitspersample
        extra, samples = tuple(map(int, page.extrasamples)), page.samplesperpixel
        colours = page.colormap
        tag = page.tags.get(274)
        orientation = int(tag.value) if tag and 1 <= tag.value <= 8 else 1
    if found.dtype == bool:
        found = found.astype(np.uint8)
    if found.dtype.kind != "u":
        raise ValueError(f"samples are {found.dtype}")
    if axes == "SYX":
        found = np.moveaxis(found, 0, -1)
    if found.ndim == 2:
        found = found[..., None]
    found = found[..., :samples].astype(np.int64)
    if photometric == 3:
        return upright(
            (np.moveaxis(colours, 0, -1)[found[..., 0]] >> 8).astype(np.uint8), orientation
        )
    found = found >> (bits - 8) if bits > 8 else found * 255 // ((1 << bits) - 1)
    if photometric == 0:
        found = 255 - found
    if photometric == 5:
        found = _rgb_of_cmyk(found)
    if extra == (0,):
        found = found[..., :-1]
    if extra == (1,):
        alpha = found[..., -1:]
        colour = np.where(alpha > 0, found[..., :-1] * 255 // np.maximum(alpha, 1), 0)
        found = np.concatenate([np.minimum(colour, 255), alpha], axis=-1)
    return upright(found.astype(np.uint8), orientation)
