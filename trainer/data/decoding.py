"""A source image's bytes to its pixels: every kind right, or refused by name.

What is refused: files that are damaged, however little, in what makes their pixels; kinds whose
pixels are not certain; animations and several pages. Metadata is never a reason: it is not read,
but for the orientation that EXIF or TIFF names.

Samples of more than 8 bits give their 8 highest, as libpng, TensorFlow and OpenCV do. CMYK becomes
RGB without a profile, and colour profiles are ignored.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import BmpImagePlugin, Image, ImageFile, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from trainer.core.errors import DataError
from trainer.data import bmp, jpeg, png, tiff, webp

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
    if data.startswith(png.SIGNATURE):
        return _png(data)
    if data.startswith(jpeg.SIGNATURE):
        return _jpeg(data)
    if webp.is_webp(data):
        return _webp(data)
    if data.startswith(bmp.SIGNATURE):
        return _bmp(data)
    if data.startswith(tiff.SIGNATURES):
        return _tiff(data)
    raise DataError("not a PNG, JPEG, WebP, BMP or TIFF image")


def _load(plugin: type[ImageFile.ImageFile], data: bytes) -> ImageFile.ImageFile:
    """Decodes with one of Pillow's decoders, whose errors on broken input are of many kinds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is doubtful was refused before
            image = plugin(io.BytesIO(data))
            image.load()
    except MemoryError:  # the machine's fault
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"damaged: it cannot be decoded ({reason})") from error
    return image


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
    source = _load(PngImagePlugin.PngImageFile, file.data)
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
    file = webp.read(data, MAX_PIXELS)
    source = _load(WebPImagePlugin.WebPImageFile, file.data)
    image = source if source.mode in {"RGB", "RGBA"} else source.convert("RGB")
    return Decoded(_upright(image, tiff.orientation(file.exif)))


def _bmp(data: bytes) -> Decoded:
    colours = bmp.check(data, MAX_PIXELS)
    source = _load(BmpImagePlugin.BmpImageFile, data)
    if source.mode == "P":
        return Decoded(_from_palette(source, colours, transparent=False))
    return Decoded(source.convert("L") if source.mode == "1" else source)


def _tiff(data: bytes) -> Decoded:
    file = tiff.read(data, MAX_PIXELS)
    source = _load(TiffImagePlugin.TiffImageFile, file.data)
    if source.mode.startswith("I;16"):
        pixels = _highest_bits(source, file.bits)
        image = Image.fromarray(255 - pixels if file.inverted else pixels)
    elif source.mode in {"P", "1", "CMYK"}:
        image = source.convert("L" if source.mode == "1" else "RGB")
    else:
        image = source
    return Decoded(_upright(image, file.orientation))
