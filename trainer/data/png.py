"""PNG files, chunk by chunk: which are whole, and what of them the pixels need.

Decoders differ in what they forgive. A file passes here only if its chunks say without doubt what
its pixels are and its compressed stream is whole to its checksum; what is passed on is nothing but
these chunks, with right checksums, which all decoders read the same.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.core.errors import DataError

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_MAX_CHUNKS = 1 << 20
_PIECE = 1 << 20  # bytes to inflate at a time

# Of the interlaced passes: first column and row, and steps to the next.
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


@dataclass(frozen=True)
class Png:
    """Contents of a PNG file's chunks.

    Attributes:
      width: pixels.
      height: pixels.
      depth: bits to a sample.
      colour_type: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA.
      colours: of the palette; 0 for other colour types.
      key: the samples of the transparent grey or colour, at `depth` bits; () if there is none.
      exif: the EXIF block, b'' if there is none.
      data: a PNG of the same pixels without anything else; of a transparent grey or colour it says
        nothing.
    """

    width: int
    height: int
    depth: int
    colour_type: int
    colours: int
    key: tuple[int, ...]
    exif: bytes
    data: bytes


@dataclass(frozen=True)
class _Chunk:
    kind: bytes
    body: bytes
    sound: bool  # it is whole, and its checksum right

    def encoded(self) -> bytes:
        crc = zlib.crc32(self.kind + self.body)
        return struct.pack(">I", len(self.body)) + self.kind + self.body + struct.pack(">I", crc)


def read(data: bytes, max_pixels: int) -> Png:
    """Looks through a PNG file.

    Metadata is left out, and so nothing in it can do harm. A file that has lost nothing but what
    comes behind its pixels is whole.

    Args:
      data: the file.
      max_pixels: more are refused, before anything is unpacked.

    Raises:
      DataError: with the reason alone. It is damaged, an animation, or says two things at once.
    """
    chunks = list(_chunks(data))
    if not chunks or chunks[0].kind != b"IHDR":
        raise DataError("damaged: it does not start with the chunk IHDR")
    pixels = [n for n, chunk in enumerate(chunks) if chunk.kind == b"IDAT"]
    if not pixels:
        raise DataError("damaged: it is truncated before its pixels (no chunk IDAT)")
    if pixels != list(range(pixels[0], pixels[-1] + 1)):
        raise DataError("damaged: its IDAT chunks do not follow each other")
    found: dict[bytes, _Chunk] = {}
    for n, chunk in enumerate(chunks):
        _check_place(chunk, n < pixels[0], found)
        if chunk.sound:
            found.setdefault(chunk.kind, chunk)
    width, height, depth, colour_type, interlaced = _header(found[b"IHDR"].body, max_pixels)
    frames = found.get(b"acTL")
    if frames is not None and len(frames.body) == 8:
        count = struct.unpack(">I", frames.body[:4])[0]
        if count != 1:
            raise DataError(f"it has {count} frames or pages; only single images are taken")
    palette = _palette(found, colour_type, depth)
    colours = len(palette[0].body) // 3 if palette else 0
    key = _key(found.get(b"tRNS"), colour_type, depth, colours)
    size = _unpacked(width, height, depth * _SAMPLES[colour_type], interlaced)
    stream = _stream([chunks[n].body for n in pixels], size)
    kept = [found[b"IHDR"], *palette, *(_Chunk(b"IDAT", body, True) for body in stream)]
    exif = found.get(b"eXIf")
    return Png(
        width=width,
        height=height,
        depth=depth,
        colour_type=colour_type,
        colours=colours,
        key=key,
        exif=exif.body if exif else b"",
        data=SIGNATURE + b"".join(each.encoded() for each in [*kept, _Chunk(b"IEND", b"", True)]),
    )


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """The chunks up to IEND, or as far as they can be followed."""
    start = len(SIGNATURE)
    for count in itertools.count():
        if count > _MAX_CHUNKS:
            raise DataError(f"it has more than {_MAX_CHUNKS} chunks")
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if len(kind) < 4 or not kind.isalpha():
            return
        body, crc = data[start + 8 : start + 8 + length], data[start + 8 + length :][:4]
        yield _Chunk(kind, body, crc == zlib.crc32(kind + body).to_bytes(4, "big"))
        if kind == b"IEND":
            return
        start += 12 + length


def _check_place(chunk: _Chunk, before_pixels: bool, found: dict[bytes, _Chunk]) -> None:
    """Refuses a chunk that makes the pixels doubtful; `found` are the sound ones before it."""
    kind, name = chunk.kind, chunk.kind.decode()
    if kind in {b"IHDR", b"PLTE", b"tRNS"}:
        if not chunk.sound:
            raise DataError(f"damaged: the checksum of its chunk {name} is wrong")
        if kind in found:
            raise DataError(f"damaged: it has two chunks {name}")
        if not before_pixels or (kind == b"PLTE" and b"tRNS" in found):
            raise DataError(f"damaged: its chunk {name} is out of place")
    elif kind[:1].isupper() and kind not in {b"IDAT", b"IEND"}:
        raise DataError(f"it has a chunk {name}, which no PNG decoder may pass over")


def _header(body: bytes, max_pixels: int) -> tuple[int, int, int, int, bool]:
    """Width, height, depth, colour type and whether it is interlaced."""
    if len(body) != 13:
        raise DataError(f"damaged: its chunk IHDR has {len(body)} bytes, not 13")
    width, height, depth, colour_type, packing, filters, interlace = struct.unpack(">IIBBBBB", body)
    if depth not in _DEPTHS.get(colour_type, ()) or packing or filters or interlace > 1:
        raise DataError("damaged: its chunk IHDR names a kind of PNG that does not exist")
    if not width or not height:
        raise DataError(f"damaged: it has {width}x{height} pixels")
    if width * height > max_pixels:
        raise DataError(f"it has {width}x{height} pixels; the limit is {max_pixels}")
    return width, height, depth, colour_type, interlace == 1


def _palette(found: dict[bytes, _Chunk], colour_type: int, depth: int) -> list[_Chunk]:
    """The chunks of the palette and its transparency, where the pixels need them."""
    if colour_type != 3:
        return []  # what others have is a proposal for screens of 256 colours
    palette = found.get(b"PLTE")
    if palette is None:
        raise DataError("damaged: it has no palette (chunk PLTE)")
    colours, rest = divmod(len(palette.body), 3)
    if rest or not 1 <= colours <= 1 << depth:
        raise DataError(f"damaged: a palette of {len(palette.body)} bytes does not fit {depth} bit")
    return [palette, *([found[b"tRNS"]] if b"tRNS" in found else [])]


def _key(chunk: _Chunk | None, colour_type: int, depth: int, colours: int) -> tuple[int, ...]:
    """The samples of the transparent grey or colour."""
    if chunk is None:
        return ()
    expected = {0: [2], 2: [6], 3: range(1, colours + 1)}.get(colour_type, [])
    if len(chunk.body) not in expected:
        raise DataError("damaged: its chunk tRNS does not fit its colours")
    if colour_type == 3:
        return ()
    key = struct.unpack(f">{len(chunk.body) // 2}H", chunk.body)
    if max(key) >= 1 << depth:
        raise DataError("damaged: its chunk tRNS names a colour that it cannot have")
    return key


def _unpacked(width: int, height: int, bits: int, interlaced: bool) -> int:
    """Bytes of the pixels and the rows' filters, of `bits` to a pixel."""
    total = 0
    for x, y, dx, dy in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _stream(bodies: list[bytes], size: int) -> list[bytes]:
    """The pixels' compressed stream, without what is behind its end.

    It is inflated, to its checksum, but not held.

    Args:
      bodies: of the IDAT chunks.
      size: bytes that it must give.
    """
    inflater, used, total = zlib.decompressobj(), [], 0
    try:
        for rest in [*bodies, b""]:
            body = rest
            while not inflater.eof:
                piece = inflater.decompress(rest, _PIECE)
                total += len(piece)
                rest = inflater.unconsumed_tail
                if total > size or not (piece or rest):
                    break
            used.append(body[: len(body) - len(inflater.unused_data)])
            if inflater.eof or total > size:
                break
    except zlib.error as error:
        raise DataError(f"damaged: its pixels cannot be unpacked ({error})") from error
    if total > size:
        raise DataError("damaged: it has more pixels than its size says")
    if not inflater.eof or total < size:
        raise DataError("damaged: it is truncated within its pixels")
    return [body for body in used if body]
