"""One source image in, one encoded image at the final size out: a pure function on bytes.

The converter's worker processes and Beam workers run this without TensorFlow.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageColor

from trainer.core.errors import DataError, UsageError
from trainer.core.text import image_size
from trainer.data import decoding

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
CROPS = ("center", "none")
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
MAX_BYTES = decoding.MAX_BYTES  # of a source
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageOptions:
    """Settings for every image of a data set.

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
            raise UsageError(
                f"resolution {image_size(self.resolution)}: a side has 1 to 16384 pixels"
            )
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
      kept: the coded pixels are the source's own.
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

    The source's own coded pixels are kept where they already are what is asked for, so nothing is
    lost and nothing grows. Everything else becomes a PNG. Neither has any metadata.

    Args:
      data: a PNG, JPEG, WebP, BMP or TIFF file.
      options: see ImageOptions.

    Raises:
      DataError: with the reason alone; the caller knows the file's name.
    """
    source = decoding.decode(data)
    image = _composite(source.image, options)
    height, width = options.resolution
    box = _crop_box(image.size, (width, height), options.crop)
    cut = (box[2] - box[0], box[3] - box[1])
    fits = image.size == cut == (width, height)
    kept = fits and source.image.mode == image.mode and bool(source.encoded)
    if kept:
        encoded, image_format = source.encoded, source.format
    else:
        if not fits:
            # RGBA is scaled with premultiplied alpha (Pillow does): no hidden colour bleeds in.
            image = image.resize((width, height), FILTERS[options.filter], box=box)
        image.info.clear()
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
            "lower --resolution, or scale up with --crop=none, which stretches what has another shape"
        )
    left, top = (width - cut_width) // 2, (height - cut_height) // 2
    return left, top, left + cut_width, top + cut_height
