"""JPEG files: which are whole, and what of them the pixels need.

A decoder fills what is missing or damaged in a JPEG with grey and warns at most. Here warnings are
errors: libjpeg-turbo, which TensorFlow and Pillow have too, must read the file without one.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

import numpy as np
import simplejpeg

from trainer.core.errors import DataError

SIGNATURE = b"\xff\xd8"

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_TABLES = (0xC4, 0xDB, 0xDD)  # of codes and quantisation, and the distance of restarts
_FRAMES = {0xC0: "baseline", 0xC1: "sequential", 0xC2: "progressive"}
_OTHER_FRAMES = {
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC6: "hierarchical",
    0xC7: "hierarchical",
    0xC9: "arithmetic-coded",
    0xCA: "arithmetic-coded",
    0xCB: "arithmetic-coded",
    0xCD: "hierarchical",
    0xCE: "hierarchical",
    0xCF: "hierarchical",
}
_METADATA = (*range(0xE0, 0xF0), 0xFE)  # of applications, and comments
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # the first marker that ends a scan
_MARKER = re.compile(rb"\xff+")  # any number of these may fill the space before a marker
_EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")

_MAX_SEGMENTS = 20_000
_MAX_SCANS = 200  # each goes over all pixels, however few bytes it has


@dataclass
class Jpeg:
    """Contents of a JPEG file's segments.

    Attributes:
      width: pixels.
      height: pixels.
      components: 1 grey, 3 colour, 4 CMYK.
      exif: the EXIF block, b'' if there is none.
      data: a JPEG of the same coded pixels without anything else.
    """

    width: int = 0
    height: int = 0
    components: int = 0
    exif: bytes = b""
    data: bytes = b""
    _frame: int = 0
    _known: dict[int, set[int]] = field(default_factory=dict)  # whole coefficients by component

    def start_frame(self, marker: int, body: bytes, max_pixels: int) -> None:
        """Takes the header of the picture."""
        if self._frame:
            raise DataError("damaged: it has two headers of a picture (SOF)")
        if len(body) < 6 or len(body) != 6 + 3 * body[5]:
            raise DataError("damaged: its header (SOF) is cut")
        precision, self.height, self.width, self.components = struct.unpack(">BHHB", body[:6])
        self._frame = marker
        self._known = {body[n]: set() for n in range(6, len(body), 3)}
        if precision != 8:
            raise DataError(f"a JPEG of {precision} bits; save it as an 8-bit JPEG or a PNG")
        if self.components not in {1, 3, 4} or len(self._known) != self.components:
            raise DataError(f"a JPEG of {self.components} components; 1, 3 and 4 are known")
        if not self.width or not self.height:
            raise DataError(f"damaged: it has {self.width}x{self.height} pixels")
        if self.width * self.height > max_pixels:
            raise DataError(f"it has {self.width}x{self.height} pixels; the limit is {max_pixels}")

    def start_scan(self, body: bytes) -> None:
        """Takes the header of a scan: which coefficients it makes whole."""
        count = body[0] if body else 0
        if not self._frame or not count or len(body) != 4 + 2 * count:
            raise DataError("damaged: the header of a scan (SOS) is wrong")
        first, last, bits = body[-3:]
        whole = range(64)
        if _FRAMES[self._frame] == "progressive":
            whole = range(first, min(last, 63) + 1) if bits & 15 == 0 else range(0)
        for component in body[1 : 1 + 2 * count : 2]:
            if component not in self._known:
                raise DataError("damaged: a scan is of a component that is not there")
            self._known[component].update(whole)

    def check_whole(self) -> None:
        """Refuses a file whose last scans are missing: decoders guess instead of them."""
        if any(len(known) < 64 for known in self._known.values()):
            raise DataError("damaged: its last scans are missing")


def read(data: bytes, max_pixels: int) -> Jpeg:
    """Looks through the segments of a JPEG file, without decoding it.

    Metadata is left out, and so are previews and other pictures behind the first.

    Args:
      data: the file.
      max_pixels: more are refused.

    Raises:
      DataError: with the reason alone. It is damaged, or of a kind that is not taken.
    """
    jpeg, parts, start, scans = Jpeg(), [SIGNATURE], 2, 0
    for _ in range(_MAX_SEGMENTS):
        marker, body, end = _segment(data, start)
        if marker == _END:
            break
        if marker in _FRAMES:
            jpeg.start_frame(marker, body, max_pixels)
        elif marker in _OTHER_FRAMES:
            raise DataError(
                f"it is a JPEG of a kind that few read ({_OTHER_FRAMES[marker]}); save it as a "
                "baseline JPEG or a PNG"
            )
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            jpeg.exif = jpeg.exif or (b"" if scans else body)
        elif marker == _SCAN:
            jpeg.start_scan(body)
            scans += 1
            if scans > _MAX_SCANS:
                raise DataError(f"a JPEG of more than {_MAX_SCANS} scans; save it again")
        elif marker not in _TABLES and marker not in _METADATA:
            raise DataError(f"damaged: it has a segment of no known kind (0x{marker:02x})")
        if marker not in _METADATA:
            parts.append(data[start:end])
        elif marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14:
            # Newer versions than 1 are unknown to decoders, and a preview is not needed.
            parts.append(b"\xff\xe0\0\x10JFIF\0\1" + body[6:12] + b"\0\0")
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            parts.append(data[start:end])  # which colours the components are
        start = end
    else:
        raise DataError(f"it has more than {_MAX_SEGMENTS} segments")
    if not scans:
        raise DataError("damaged: it is truncated before its pixels")
    jpeg.check_whole()
    jpeg.data = b"".join([*parts, b"\xff\xd9"])
    return jpeg


def _segment(data: bytes, start: int) -> tuple[int, bytes, int]:
    """A segment's marker, its body, and where the next starts; of a scan, behind its pixels."""
    filling = _MARKER.match(data, start)
    place = filling.end() - 1 if filling else start
    if place + 2 > len(data):
        return _END, b"", len(data)
    if not filling:
        raise DataError(f"damaged: there is no segment at byte {place}")
    marker = data[place + 1]
    if marker == _END:
        return marker, b"", place + 2
    if marker < 0xC0 or 0xD0 <= marker <= _START:
        raise DataError(f"damaged: a marker 0x{marker:02x} at byte {place} is out of place")
    end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    if end < place + 4 or end > len(data):
        raise DataError(f"damaged: it is truncated within the segment at byte {place}")
    body = data[place + 4 : end]
    if marker == _SCAN:
        found = _AFTER_SCAN.search(data, end)
        end = found.start() if found else len(data)
    return marker, body, end


def decode(jpeg: Jpeg) -> np.ndarray:
    """The pixels: uint8 [height, width, components]; CMYK as Adobe stores it, 255 for no ink.

    Bytes without meaning before the end, which some cameras leave there, are taken out of `jpeg.data`.

    Raises:
      DataError: with the reason alone. It is damaged: libjpeg-turbo warns or fails.
    """
    colours = {1: "GRAY", 3: "RGB", 4: "CMYK"}[jpeg.components]
    for _ in range(2):
        try:
            return simplejpeg.decode_jpeg(jpeg.data, colours, strict=True)
        except ValueError as error:
            reason = str(error)
        surplus = _EXTRANEOUS.fullmatch(reason)
        if not surplus:
            break
        jpeg.data = jpeg.data[: -2 - int(surplus[1])] + b"\xff\xd9"
    raise DataError(f"damaged: {reason}")
