"""One source image in, one encoded image at the final size out: a pure function on bytes.

Pillow only: the converter's worker processes and Beam workers run this without TensorFlow.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageOps

from trainer.core.errors import DataError, TrainerError, UsageError

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
CROPS = ("center", "none")
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# What a hostile or broken source may make one worker allocate.
MAX_PIXELS = 80_000_000
MAX_BYTES = 256 << 20

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_KEPT_FORMATS = {"PNG": "png", "JPEG": "jpeg"}  # what the input pipeline can decode
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageOptions:
    """How every image of a data set is made.

    Attributes:
      resolution: (height, width) in pixels.
      channels: 1 (L), 2 (LA), 3 (RGB), 4 (RGBA), or 0 for what each image has by itself.
      crop: 'center' cuts the largest centred part of the target's shape; 'none' takes the whole
        image, which changes its proportions where the shapes differ.
      filter: 'lanczos' or 'box'.
      background: CSS colour under transparent pixels, or '' to keep transparency.
    """

    resolution: tuple[int, int]
    channels: int = 0
    crop: str = "center"
    filter: str = "lanczos"
    background: str = ""

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UsageError(f"crop {self.crop!r} is not one of {', '.join(CROPS)}")
        if self.filter not in FILTERS:
            raise UsageError(f"filter {self.filter!r} is not one of {', '.join(FILTERS)}")
        if self.channels not in {0, *MODES}:
            raise UsageError(f"{self.channels} channels: an image has 1 to 4")
        if not all(1 <= side <= 16384 for side in self.resolution):
            raise UsageError(f"resolution {self.resolution}: a side has 1 to 16384 pixels")
        self.background_rgb()

    def background_rgb(self) -> tuple[int, int, int]:
        """The background's red, green and blue, 0 to 255; white where none is named.

        Raises:
          UsageError: the name is no colour.
        """
        try:
            red, green, blue = ImageColor.getrgb(self.background or "white")[:3]
        except ValueError:
            raise UsageError(
                f"background {self.background!r} is no colour; write a name or '#rrggbb'"
            ) from None
        return red, green, blue


@dataclass(frozen=True)
class EncodedImage:
    """An image at its final size.

    Attributes:
      data: PNG or JPEG bytes.
      format: 'png' or 'jpeg'.
      height: pixels.
      width: pixels.
      channels: 1 to 4.
      kept: the source's own bytes.
      enlarged: a side was scaled up.
      stretched: the proportions changed by more than one percent.
    """

    data: bytes
    format: str
    height: int
    width: int
    channels: int
    kept: bool
    enlarged: bool
    stretched: bool


def encode(data: bytes, options: ImageOptions) -> EncodedImage:
    """Decodes, turns upright, crops, scales and encodes one image.

    The source's own bytes are kept where they already are what is asked for, so nothing is lost
    and nothing grows. Everything else becomes a PNG. 16-bit samples keep their high byte, as
    libpng and Pillow do for colour. Colour profiles are ignored.

    Args:
      data: a PNG, JPEG, WebP, BMP or TIFF file.
      options: see ImageOptions.

    Raises:
      DataError: with the reason alone; the caller knows the file's name.
    """
    if len(data) > MAX_BYTES:
        raise DataError(f"it has {len(data)} bytes; the limit is {MAX_BYTES}")
    if not data:
        raise DataError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about broken metadata: the pixels are what counts
            return _encode(data, options)
    except TrainerError:
        raise
    except Exception as error:
        # Pillow's decoders answer broken and hostile input with exceptions of many kinds.
        reason = " ".join(str(error).split()) or type(error).__name__
        if "cannot identify image file" in reason:
            reason = "not a PNG, JPEG, WebP, BMP or TIFF image"
        raise DataError(reason) from error


def _encode(data: bytes, options: ImageOptions) -> EncodedImage:
    source = Image.open(io.BytesIO(data), formats=_FORMATS)
    _check_header(source)
    source.load()
    image = _composite(_plain(source), options)
    height, width = options.resolution
    box = _crop_box(image.size, (width, height), options.crop)
    cut = (box[2] - box[0], box[3] - box[1])
    fits = image.size == cut == (width, height)
    kept = fits and source.mode == image.mode and _is_decodable(source, data)
    if kept:
        encoded, image_format = data, _KEPT_FORMATS[str(source.format)]
    else:
        if not fits:
            # RGBA is scaled with premultiplied alpha (Pillow does): no hidden colour bleeds in.
            image = image.resize((width, height), FILTERS[options.filter], box=box)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded, image_format = buffer.getvalue(), "png"
    return EncodedImage(
        data=encoded,
        format=image_format,
        height=height,
        width=width,
        channels=len(image.getbands()),
        kept=kept,
        enlarged=width > cut[0] or height > cut[1],
        stretched=abs(cut[0] * height / (cut[1] * width) - 1) > 0.01,
    )


def _is_decodable(source: Image.Image, data: bytes) -> bool:
    """Whether TensorFlow's decoders read from the source's bytes what Pillow read."""
    if source.format not in _KEPT_FORMATS or "transparency" in source.info:
        return False
    if source.format == "PNG" and data[24] != 8:  # bits to a sample, in the IHDR chunk
        return False
    return source.getexif().get(_ORIENTATION, 1) == 1


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"it has {width}x{height} pixels; the limit is {MAX_PIXELS}")
    frames = getattr(image, "n_frames", 1)
    # MPO is a photo with a preview after it: its first frame is the picture.
    if frames > 1 and image.format != "MPO":
        raise DataError(f"it has {frames} frames or pages; only single images are taken")


def _plain(image: Image.Image) -> Image.Image:
    """The upright image as L, LA, RGB or RGBA."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    transparent = "transparency" in image.info
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in {"PNG", None}):
        return _high_byte(image)
    if mode in {"I", "F"}:
        raise DataError(f"its samples are 32-bit (mode {mode}); save it with 8 or 16 bits")
    if mode in {"L", "RGB"} and transparent:
        return image.convert("LA" if mode == "L" else "RGBA")
    if mode in MODES.values():
        return image
    if mode == "1":
        return image.convert("LA" if transparent else "L")
    if mode == "P":
        return image.convert("RGBA" if transparent else "RGB")
    return image.convert("RGBA" if mode in {"PA", "RGBa", "La"} else "RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; a transparent grey value becomes alpha."""
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _composite(image: Image.Image, options: ImageOptions) -> Image.Image:
    """The image in its output mode, transparency laid over the background where that is due."""
    if image.mode in {"LA", "RGBA"} and (options.background or options.channels in {1, 3}):
        if image.getchannel("A").getextrema()[0] == 255:
            colour = (255, 255, 255)
        elif options.background:
            colour = options.background_rgb()
        else:
            raise DataError(
                "it has transparent pixels; pass --background=white (or another colour) to lay "
                "them over, or --channels=rgba to keep them"
            )
        base = Image.new("RGBA", image.size, (*colour, 255))
        base.alpha_composite(image.convert("RGBA"))
        grey = image.mode == "LA" and len(set(options.background_rgb())) == 1
        image = base.convert("L" if grey else "RGB")
    mode = MODES.get(options.channels, image.mode)
    return image if image.mode == mode else image.convert(mode)


def _crop_box(
    size: tuple[int, int], target: tuple[int, int], crop: str
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the part of the source that becomes the image."""
    width, height = size
    if crop == "none":
        return 0, 0, width, height
    # The largest centred box of the target's shape, in whole pixels.
    cut_width = min(width, max(1, round(height * target[0] / target[1])))
    cut_height = min(height, max(1, round(width * target[1] / target[0])))
    if cut_width < target[0] or cut_height < target[1]:
        raise DataError(
            f"it is {width}x{height}, too small for a crop of {target[0]}x{target[1]}; "
            "lower --resolution, or scale up with --crop=none"
        )
    left, top = (width - cut_width) // 2, (height - cut_height) // 2
    return left, top, left + cut_width, top + cut_height
