"""BMP files: which kinds are taken."""

from __future__ import annotations

import struct

from trainer.core.errors import DataError

SIGNATURE = b"BM"

_HEADERS = (40, 52, 56, 108, 124)  # bytes of the headers that Windows has had
_PLAIN, _MASKS = 0, 3


def check(data: bytes, max_pixels: int) -> int:
    """Refuses a file that is damaged, or that Pillow would read in another way than it is meant.

    Args:
      data: the file.
      max_pixels: more are refused.

    Returns:
      The colours of the palette, 0 if the pixels have none.

    Raises:
      DataError: with the reason alone.
    """
    if len(data) < 54:
        raise DataError("damaged: it is truncated within its header")
    size, _, start, header = struct.unpack_from("<IIII", data, 2)
    if header not in _HEADERS:
        raise _unknown(f"its header has {header} bytes")
    width, height, planes, bits, packing, length = struct.unpack_from("<iiHHII", data, 18)
    if width <= 0 or not height or planes != 1:
        raise DataError(f"damaged: it has {width}x{height} pixels in {planes} planes")
    if width * abs(height) > max_pixels:
        raise DataError(f"it has {width}x{abs(height)} pixels; the limit is {max_pixels}")
    if packing not in {_PLAIN, _MASKS} or (packing == _MASKS and bits not in {16, 32}):
        raise _unknown(f"{bits} bits, compressed (BI_COMPRESSION {packing})")
    if max(size, start + length) > len(data):
        raise DataError(f"damaged: it has {len(data)} of {max(size, start + length)} bytes")
    end = 14 + header
    if packing == _MASKS:
        if not all(struct.unpack_from("<III", data.ljust(66, b"\0"), 54)):
            raise _unknown("a mask of its colours is empty")
        if header == 40:
            end += 12
            if start != end:
                raise _unknown("more than three masks may belong to its header")
    colours = _palette(data, bits, end) if bits <= 8 else 0
    if start < end + 4 * colours:
        raise DataError("damaged: its pixels start within its header")
    return colours


def _palette(data: bytes, bits: int, start: int) -> int:
    colours = int.from_bytes(data[46:50], "little") or 1 << bits
    if bits not in {1, 4, 8} or colours > 1 << bits:
        raise DataError(f"damaged: it has {bits} bits and a palette of {colours} colours")
    # Pillow takes a palette of greys for none, and then goes by their number, not by the bits.
    palette = [data[start + 4 * n : start + 4 * n + 3] for n in range(colours)]
    two = palette == [b"\0\0\0", b"\xff\xff\xff"]
    grey = colours != 2 and all(each == bytes([n] * 3) for n, each in enumerate(palette))
    if (two and bits != 1) or (grey and bits != 8):
        raise _unknown(f"{colours} greys in {bits} bits")
    return colours


def _unknown(what: str) -> DataError:
    return DataError(f"a BMP of a kind that is not taken: {what}; save it plainly, or as PNG")
