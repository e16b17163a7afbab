"""TIFF files: which kinds are taken, and what of them the pixels need.

TIFF is many formats, and decoders guess where they don't know one. Here the tags are read first. A
file passes if its kind is in a short list and all its strips or tiles are there; what is passed on
has the tags that the pixels need and no others.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from trainer.core.errors import DataError

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are of BigTIFF

# The tags that the pixels need.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _SAMPLES, _STRIP_ROWS, _STRIP_BYTES, _PLANAR = 273, 274, 277, 278, 279, 284
_PREDICTOR, _PALETTE, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 317, 320, 322, 323, 324, 325
_INKS, _EXTRA, _FORMAT, _SUBSAMPLING = 332, 338, 339, 530
_NEEDED = {
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIPS, _ORIENTATION),
    *(_SAMPLES, _STRIP_ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR, _PALETTE, _TILE_WIDTH),
    *(_TILE_HEIGHT, _TILES, _TILE_BYTES, _INKS, _EXTRA, _FORMAT, _SUBSAMPLING),
}
_TYPES = {3: "H", 4: "I", 16: "Q"}  # the unsigned integers, by the code of their type

_RAW, _LZW, _DEFLATE, _PACKBITS = 1, 5, (8, 32946), 32773
_COMPRESSIONS = {_RAW, _LZW, *_DEFLATE, _PACKBITS}
_PREDICTED = {_LZW, *_DEFLATE}
_OTHER_COMPRESSIONS = {
    2: "CCITT",
    3: "CCITT",
    4: "CCITT",
    6: "JPEG",
    7: "JPEG",
    34712: "JPEG 2000",
    34887: "LERC",
    34925: "LZMA",
    50000: "Zstandard",
    50001: "WebP",
    50002: "JPEG XL",
}
_FORMATS = {2: "signed", 3: "floating-point", 4: "undefined", 5: "complex", 6: "complex"}
_WHITE, _BLACK, _RGB, _INDEXED, _CMYK = 0, 1, 2, 3, 5
_OTHER_PHOTOMETRIC = {
    4: "a mask",
    6: "YCbCr",
    8: "CIELAB",
    9: "ICCLAB",
    10: "ITULAB",
    32803: "a camera's raw data",
    32844: "LogL",
    32845: "LogLuv",
}
# What may be made of samples, by photometric interpretation and extra samples (0 unknown, 1 and 2
# alpha, premultiplied or not): the bits to a sample.
_KINDS = {
    (_WHITE, ()): (1, 2, 4, 8, 16),
    (_BLACK, ()): (1, 2, 4, 8, 12, 16),
    (_BLACK, (2,)): (8,),
    (_RGB, ()): (8, 16),
    (_RGB, (0,)): (8, 16),
    (_RGB, (1,)): (8, 16),
    (_RGB, (2,)): (8, 16),
    (_INDEXED, ()): (1, 2, 4, 8),
    (_CMYK, ()): (8,),
}
_PLANES = {(_RGB, ()), (_RGB, (2,)), (_CMYK, ())}  # of these, the samples may lie apart
_COLOURS = {_WHITE: 1, _BLACK: 1, _RGB: 3, _INDEXED: 1, _CMYK: 4}

_MAX_ENTRIES = 4096
_MAX_STRIPS = 1 << 20
_PIECE = 1 << 20  # bytes to inflate at a time


@dataclass(frozen=True)
class Tiff:
    """Contents of a TIFF file's tags.

    Attributes:
      width: pixels, as they are stored.
      height: pixels, as they are stored.
      bits: to a sample.
      inverted: `data` has 0 for white, though it says otherwise.
      orientation: 1 to 8, as in EXIF.
      data: a TIFF of the same pixels with no orientation and no other tags.
    """

    width: int
    height: int
    bits: int
    inverted: bool
    orientation: int
    data: bytes


@dataclass(frozen=True)
class _Layout:
    """Number format of a file's samples."""

    order: str  # '<' or '>'
    big: bool  # BigTIFF: of 64 bits

    @property
    def offset(self) -> str:
        return self.order + ("Q" if self.big else "I")

    @property
    def count(self) -> str:  # of the tags in a directory
        return self.order + ("Q" if self.big else "H")

    @property
    def entry(self) -> str:  # tag, type, number of values; then the values or where they are
        return self.order + ("HHQ" if self.big else "HHI")

    @property
    def place(self) -> int:  # of the offset of the first directory
        return 8 if self.big else 4


def read(data: bytes, max_pixels: int) -> Tiff:
    """Looks through a TIFF file, without decoding it.

    Metadata is left out, and so nothing in it can do harm.

    Args:
      data: the file.
      max_pixels: more are refused.

    Raises:
      DataError: with the reason alone. It is damaged, or of a kind that is not taken.
    """
    layout, tags, more = _directory(data)
    if more:
        raise DataError("it has several pages; only single images are taken")
    if layout.big and layout.order == ">":
        raise _unknown("a BigTIFF with the most significant bytes first")
    width, height = _one(tags, _WIDTH, 0), _one(tags, _HEIGHT, 0)
    if not width or not height:
        raise DataError(f"damaged: it has {width}x{height} pixels")
    if width * height > max_pixels:
        raise DataError(f"it has {width}x{height} pixels; the limit is {max_pixels}")
    bits, samples = _check_kind(tags, layout.order)
    _check_strips(data, layout, tags, bits, samples, max_pixels)
    orientation = _one(tags, _ORIENTATION, 1)
    inverted = bits == 16 and _one(tags, _PHOTOMETRIC, 0) == _WHITE
    changed = {_PHOTOMETRIC: (_BLACK,)} if inverted else {}
    changed |= {_PLANAR: (1,)} if samples == 1 else {}
    return Tiff(
        width=width,
        height=height,
        bits=bits,
        inverted=inverted,
        orientation=orientation if 1 <= orientation <= 8 else 1,
        data=_rewrite(data, layout, tags | changed),
    )


def orientation(exif: bytes) -> int:
    """The orientation that an EXIF block names, 1 to 8; 1 where it names none.

    A block that is broken elsewhere still names it.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number, found = struct.unpack_from(order + "HHIH", exif, entry)
            if (tag, kind, number) == (_ORIENTATION, 3, 1):
                return found if 1 <= found <= 8 else 1
    except struct.error:
        pass  # the block ends within its tags
    return 1


def _directory(data: bytes) -> tuple[_Layout, dict[int, tuple[int, ...]], bool]:
    """The needed tags of the first page, and whether there are more pages."""
    if data[:4] not in SIGNATURES:
        raise DataError("damaged: it does not start as a TIFF")
    layout = _Layout("<" if data[:1] == b"I" else ">", b"+" in data[:4])
    try:
        (start,) = struct.unpack_from(layout.offset, data, layout.place)
        (count,) = struct.unpack_from(layout.count, data, start)
        if count > _MAX_ENTRIES:
            raise DataError(f"damaged: it has {count} tags")
        inline = struct.calcsize(layout.offset)
        size = struct.calcsize(layout.entry) + inline
        first = start + struct.calcsize(layout.count)
        tags: dict[int, tuple[int, ...]] = {}
        for entry in range(first, first + count * size, size):
            tag, kind, number = struct.unpack_from(layout.entry, data, entry)
            if tag not in _NEEDED:
                continue
            if kind not in _TYPES or not 1 <= number <= _MAX_STRIPS or tag in tags:
                raise DataError(f"damaged: its tag {tag} is wrong")
            values = f"{layout.order}{number}{_TYPES[kind]}"
            place = entry + size - inline
            if struct.calcsize(values) > inline:
                (place,) = struct.unpack_from(layout.offset, data, place)
                if place < 2 * layout.place:
                    raise DataError(f"damaged: its tag {tag} lies within its header")
            tags[tag] = struct.unpack_from(values, data, place)
        (following,) = struct.unpack_from(layout.offset, data, first + count * size)
    except (struct.error, OverflowError):
        raise DataError("damaged: it is truncated within its tags") from None
    return layout, tags, following != 0


def _one(tags: dict[int, tuple[int, ...]], tag: int, default: int) -> int:
    values = tags.get(tag, (default,))
    if len(values) != 1:
        raise DataError(f"damaged: its tag {tag} has {len(values)} values")
    return values[0]


def _check_kind(tags: dict[int, tuple[int, ...]], order: str) -> tuple[int, int]:
    """Bits to a sample and samples to a pixel of a file whose kind is known."""
    compression = _one(tags, _COMPRESSION, _RAW)
    if compression not in _COMPRESSIONS:
        name = _OTHER_COMPRESSIONS.get(compression, f"number {compression}")
        raise _unknown(f"its compression is {name}")
    if _PHOTOMETRIC not in tags:
        raise DataError("damaged: it does not say what its samples are (PhotometricInterpretation)")
    photometric = _one(tags, _PHOTOMETRIC, 0)
    if photometric not in _COLOURS:
        name = _OTHER_PHOTOMETRIC.get(photometric, f"number {photometric}")
        raise _unknown(f"its colours are {name}")
    samples, extra = _one(tags, _SAMPLES, 1), tags.get(_EXTRA, ())
    if samples != _COLOURS[photometric] + len(extra):
        raise _unknown(
            f"it has {samples} samples to a pixel, but names what "
            f"{_COLOURS[photometric] + len(extra)} are (ExtraSamples)"
        )
    depths = tags.get(_BITS, (1,))
    if len(depths) not in {1, samples} or len(set(depths)) > 1:
        raise _unknown(f"its samples have {', '.join(map(str, depths[:8]))} bits")
    bits = depths[0]
    for number in tags.get(_FORMAT, ()):
        if number != 1:
            raise _unknown(f"its samples are {bits}-bit {_FORMATS.get(number, 'of no format')}")
    if bits not in _KINDS.get((photometric, extra), ()):
        raise _unknown(
            f"its samples are {bits}-bit (PhotometricInterpretation {photometric}, ExtraSamples "
            f"{', '.join(map(str, extra[:8])) or 'none'})"
        )
    if bits == 12 and order == ">":
        raise _unknown("its samples are 12-bit, with the most significant bytes first")
    if _one(tags, _FILL_ORDER, 1) != 1:
        raise _unknown("its bits are in reverse order (FillOrder)")
    if photometric == _CMYK and _one(tags, _INKS, 1) != 1:
        raise _unknown("its inks are not cyan, magenta, yellow and black")
    planar = _one(tags, _PLANAR, 1)
    if planar not in {1, 2}:
        raise DataError("damaged: its samples lie in no known way (PlanarConfiguration)")
    if planar == 2 and samples > 1 and (bits != 8 or (photometric, extra) not in _PLANES):
        raise _unknown(f"its samples are {bits}-bit and lie apart (PlanarConfiguration)")
    predictor = _one(tags, _PREDICTOR, 1)
    if predictor != 1 and (predictor != 2 or bits not in {8, 16} or compression not in _PREDICTED):
        raise _unknown(f"its predictor is number {predictor}, with {bits} bits")
    if _SUBSAMPLING in tags:
        raise _unknown("it names the sampling of YCbCr, but has none")
    if photometric == _INDEXED:
        _check_palette(tags.get(_PALETTE, ()), bits)
    return bits, samples


def _unknown(what: str) -> DataError:
    return DataError(
        f"a TIFF of a kind that is not taken: {what}; save it with 8 bits as RGB or grey, or as PNG"
    )


def _check_palette(palette: tuple[int, ...], bits: int) -> None:
    if len(palette) != 3 << bits:
        raise DataError(f"damaged: its palette has {len(palette)} numbers, not {3 << bits}")
    if 0 < max(palette) < 256:
        raise _unknown("its palette has 8 bits, where TIFF has 16")


def _check_strips(
    data: bytes,
    layout: _Layout,
    tags: dict[int, tuple[int, ...]],
    bits: int,
    samples: int,
    max_pixels: int,
) -> None:
    """Refuses a file of whose strips or tiles one is not there, not whole or of another size."""
    width, height = _one(tags, _WIDTH, 0), _one(tags, _HEIGHT, 0)
    tiled = _TILES in tags
    if tags.keys() & (
        {_STRIPS, _STRIP_BYTES} if tiled else {_TILE_WIDTH, _TILE_HEIGHT, _TILE_BYTES}
    ):
        raise DataError("damaged: it has tags of strips and of tiles")
    if tiled:
        columns, rows = _one(tags, _TILE_WIDTH, 0), _one(tags, _TILE_HEIGHT, 0)
    else:
        columns, rows = width, min(height, _one(tags, _STRIP_ROWS, height))
    if not 0 < columns * rows <= max_pixels:
        raise DataError(f"damaged: its strips or tiles have {columns}x{rows} pixels")
    places = tags.get(_TILES if tiled else _STRIPS, ())
    lengths = tags.get(_TILE_BYTES if tiled else _STRIP_BYTES, ())
    planes = samples if _one(tags, _PLANAR, 1) == 2 else 1
    down = -(-height // rows)
    count = planes * down * -(-width // columns)
    if not len(places) == len(lengths) == count:
        raise DataError(f"damaged: it names {len(places)} of its {count} strips or tiles")
    if sum(lengths) > len(data):
        raise DataError(
            "damaged: its strips or tiles overlap, or it is truncated within its pixels"
        )
    compression = _one(tags, _COMPRESSION, _RAW)
    row = (columns * bits * (samples // planes) + 7) // 8
    for n, (place, length) in enumerate(zip(places, lengths, strict=True)):
        short = 0 if tiled or n % down < down - 1 else down * rows - height
        size = row * (rows - short)
        if place < 2 * layout.place:
            raise DataError("damaged: its pixels start within its header")
        if place + length > len(data) or not length:
            raise DataError("damaged: it is truncated within its pixels")
        if compression == _LZW:
            continue  # it has no checksum, and libtiff finds out whether it ends early
        found = length
        if compression in _DEFLATE:
            found = _inflated(data[place : place + length], size)
        elif compression == _PACKBITS:
            found = _unpacked(data[place : place + length], size)
        if found < size or (found > size and compression != _RAW):
            raise DataError("damaged: its pixels are not as many as its size says")


def _inflated(stream: bytes, most: int) -> int:
    """Bytes that a strip gives, up to one more than `most`, by Deflate, to its checksum.

    libtiff stops when it has enough, before the checksum.
    """
    inflater, total = zlib.decompressobj(), 0
    try:
        while not inflater.eof and total <= most:
            piece = inflater.decompress(stream, min(_PIECE, most - total + 1))
            total += len(piece)
            stream = inflater.unconsumed_tail
            if not (piece or stream):
                raise DataError("damaged: it is truncated within its pixels")
    except zlib.error as error:
        raise DataError(f"damaged: its pixels cannot be unpacked ({error})") from error
    return total


def _unpacked(stream: bytes, most: int) -> int:
    """Bytes that a strip gives, up to a run more than `most`, by PackBits."""
    total = start = 0
    while start < len(stream) and total <= most:
        head = stream[start]
        if head < 128:
            total += head + 1
            start += head + 2
        else:
            total += 257 - head if head > 128 else 0
            start += 2 if head > 128 else 1
    return total if start <= len(stream) else 0


def _rewrite(data: bytes, layout: _Layout, tags: dict[int, tuple[int, ...]]) -> bytes:
    """The file with a directory of the needed tags alone, behind what was there."""
    inline = struct.calcsize(layout.offset)
    out, entries = bytearray(data), bytearray()
    kept = {tag: values for tag, values in sorted(tags.items()) if tag != _ORIENTATION}
    for tag, values in kept.items():
        kind = next(
            kind for kind in (3, 4, 16) if max(values) < 256 ** struct.calcsize(_TYPES[kind])
        )
        packed = struct.pack(f"{layout.order}{len(values)}{_TYPES[kind]}", *values)
        entries += struct.pack(layout.entry, tag, kind, len(values))
        if len(packed) > inline:
            out += b"\0" * (-len(out) % 8)
            entries += struct.pack(layout.offset, len(out))
            out += packed
        else:
            entries += packed.ljust(inline, b"\0")
    out += b"\0" * (-len(out) % 8)
    struct.pack_into(layout.offset, out, layout.place, len(out))
    out += struct.pack(layout.count, len(kept)) + entries + struct.pack(layout.offset, 0)
    return bytes(out)
