"""A source image's bytes to its pixels: every kind right, or refused by name.

What is refused: files that are damaged, however little, in what makes their pixels; kinds whose
pixels are not certain; animations and several pages. Metadata is never a reason: it is not read,
but for the orientation that EXIF or TIFF names.

Samples of more than 8 bits give their 8 highest, as libpng, TensorFlow and OpenCV do. CMYK becomes
RGB without a profile, and colour profiles are ignored.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import BmpImagePlugin, Image, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from trainer.core.errors import DataError, TrainerError
from trainer.data import jpeg, png, tiff

# What a hostile or broken source may make one worker allocate.
MAX_PIXELS = 80_000_000
MAX_BYTES = 256 << 20

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoded:
    """A source image.

    Attributes:
      image: upright, in mode L, LA, RGB or RGBA.
      encoded: the source's own coded pixels as a file that the input pipeline decodes to just this
        image; b'' where there is none.
      format: of `encoded`, 'png' or 'jpeg'.
    """

    image: Image.Image
    encoded: bytes = b""
    format: str = ""


def decode(data: bytes) -> Decoded:
    """Decodes a PNG, JPEG, WebP, BMP or TIFF file.

    Raises:
      DataError: with the reason alone, in a line; the caller knows the file's name.
    """
    if not data:
        raise DataError("the file is empty")
    if len(data) > MAX_BYTES:
        raise DataError(f"it has {len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is doubtful is an error here, or no matter
            if data.startswith(png.SIGNATURE):
                return _png(data)
            if data.startswith(jpeg.SIGNATURE):
                return _jpeg(data)
            if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
                return _webp(data)
            if data.startswith(b"BM"):
                return _bmp(data)
            if data.startswith(tiff.SIGNATURES):
                return _tiff(data)
    except TrainerError:
        raise
    except Exception as error:
        # Pillow's decoders answer broken and hostile input with exceptions of many kinds.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"damaged: it cannot be decoded ({reason})") from error
    raise DataError("not a PNG, JPEG, WebP, BMP or TIFF image")


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _from_palette(image: Image.Image, colours: int, *, transparent: bool) -> Image.Image:
    if int(np.asarray(image).max()) >= colours:
        raise DataError(f"damaged: its pixels name colours beyond its palette of {colours}")
    return image.convert("RGBA" if transparent else "RGB")


def _highest_bits(image: Image.Image, bits: int) -> np.ndarray:
    """uint8 [height, width] of Pillow's grey images of more than 8 bits."""
    return (np.asarray(image).astype(np.uint16) >> (bits - 8)).astype(np.uint8)


def _with_alpha(image: Image.Image, opaque: np.ndarray) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
    return image


# ---- formats -------------------------------------------------------------------------------------


def _png(data: bytes) -> Decoded:
    file = png.read(data, MAX_PIXELS)
    source = PngImagePlugin.PngImageFile(io.BytesIO(file.data))
    source.load()
    orientation = tiff.orientation(file.exif)
    grey, colour, indexed, grey_alpha = (file.colour_type == kind for kind in (0, 2, 3, 4))
    image: Image.Image = source
    if indexed:
        image = _from_palette(source, file.colours, transparent="transparency" in source.info)
    elif grey and file.depth == 16:
        image = Image.fromarray(_highest_bits(source, 16))
        if file.key:
            image = _with_alpha(image, np.asarray(source) != file.key[0])
    elif grey:
        image = source.convert("L")
        if file.key:
            key = file.key[0] * (255 // ((1 << file.depth) - 1))
            image = _with_alpha(image, np.asarray(image) != key)
    elif colour and file.key:
        if file.depth == 16:
            raise DataError(
                "a PNG of a kind that is not taken: 16 bits and a transparent colour (tRNS); save "
                "it with 8 bits"
            )
        image = _with_alpha(image, (np.asarray(image) != file.key).any(axis=2))
    elif grey_alpha:
        image = source if source.mode == "LA" else source.convert("LA")
    own = file.depth == 8 and not indexed and not file.key and orientation == 1
    return Decoded(_upright(image, orientation), file.data if own else b"", "png")


def _jpeg(data: bytes) -> Decoded:
    file = jpeg.read(data, MAX_PIXELS)
    pixels = jpeg.decode(file)
    orientation = tiff.orientation(file.exif)
    if file.components == 4:
        return Decoded(_upright(Image.fromarray(255 - pixels, "CMYK").convert("RGB"), orientation))
    image = Image.fromarray(pixels[..., 0] if file.components == 1 else pixels)
    return Decoded(_upright(image, orientation), file.data if orientation == 1 else b"", "jpeg")


def _webp(data: bytes) -> Decoded:
    (size,) = struct.unpack("<I", data[4:8])
    if len(data) < 30 or len(data) < 8 + size:
        raise DataError("damaged: it ends within its pixels")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[n : n + 3], "little") + 1 for n in (24, 27))
    elif kind == b"VP8L":
        (packed,) = struct.unpack("<I", data[21:25])
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        width, height = (number & 0x3FFF for number in struct.unpack("<HH", data[26:30]))
    if width * height > MAX_PIXELS:  # libwebp allocates them before it says how many they are
        raise DataError(f"it has {width}x{height} pixels; the limit is {MAX_PIXELS}")
    source = WebPImagePlugin.WebPImageFile(io.BytesIO(data))
    if source.n_frames > 1:
        raise DataError(f"it has {source.n_frames} frames or pages; only single images are taken")
    source.load()
    exif = source.info.get("exif", b"")
    image = source if source.mode in {"RGB", "RGBA"} else source.convert("RGB")
    return Decoded(_upright(image, tiff.orientation(exif)))


def _bmp(data: bytes) -> Decoded:
    colours = _check_bmp(data)
    source = BmpImagePlugin.BmpImageFile(io.BytesIO(data))
    source.load()
    if source.mode == "P":
        return Decoded(_from_palette(source, colours, transparent=False))
    return Decoded(source.convert("L") if source.mode == "1" else source)


def _check_bmp(data: bytes) -> int:
    """Refuses what Pillow would read in another way than it is meant; the palette's colours."""
    pixels, header = struct.unpack_from("<II", data, 10)
    if header not in {40, 52, 56, 108, 124}:
        raise DataError(
            f"a BMP of a kind that is not taken: its header has {header} bytes; save it as PNG"
        )
    width, height, planes, bits, packing = struct.unpack_from("<iiHHI", data, 18)
    (colours,) = struct.unpack_from("<I", data, 46)
    if width <= 0 or not height or planes != 1:
        raise DataError(f"damaged: it has {width}x{height} pixels in {planes} planes")
    if width * abs(height) > MAX_PIXELS:
        raise DataError(f"it has {width}x{abs(height)} pixels; the limit is {MAX_PIXELS}")
    if packing not in {0, 3} or (packing == 3 and bits not in {16, 24, 32}):
        raise DataError(
            f"a BMP of a kind that is not taken: {bits} bits, compressed (BI_COMPRESSION "
            f"{packing}); save it uncompressed or as PNG"
        )
    end = 14 + header
    if bits > 8:
        colours = 0
    else:
        colours = colours or 1 << bits
        if bits not in {1, 4, 8} or colours > 1 << bits:
            raise DataError(f"damaged: it has {bits} bits and a palette of {colours} colours")
        # Pillow takes palettes of greys for no palettes, and then goes by their size.
        palette = [data[end + 4 * n : end + 4 * n + 3] for n in range(colours)]
        grey = colours != 2 and all(each == bytes([n] * 3) for n, each in enumerate(palette))
        two = palette == [b"\0" * 3, b"\xff" * 3]
        if (bits != 1 and two) or (bits != 8 and grey):
            raise DataError(
                f"a BMP of a kind that is not taken: {colours} greys in {bits} bits; save it as PNG"
            )
    if pixels < end + 4 * colours:
        raise DataError("damaged: its pixels start within its header")
    return colours


def _tiff(data: bytes) -> Decoded:
    file = tiff.read(data, MAX_PIXELS)
    source = TiffImagePlugin.TiffImageFile(io.BytesIO(file.data))
    source.load()
    if source.mode.startswith("I;16"):
        pixels = _highest_bits(source, file.bits)
        image = Image.fromarray(255 - pixels if file.inverted else pixels)
    elif source.mode in {"P", "1", "CMYK"}:
        image = source.convert("L" if source.mode == "1" else "RGB")
    else:
        image = source
    return Decoded(_upright(image, file.orientation))
