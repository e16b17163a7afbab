"""Moving pictures: frames to MP4, GIF or WebP, by the name of the file."""

from __future__ import annotations

import importlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from types import ModuleType

import numpy as np
from PIL import Image

from trainer.core import storage
from trainer.core.errors import UsageError
from trainer.telemetry.images import enlarge, to_pillow

FORMATS = ("mp4", "gif", "webp")
_MIN_WIDTH = 256  # pixels: smaller videos are blurred by every player, and by chroma subsampling


def format_of(path: str) -> str:
    """The format a file name asks for, once it is sure that it can be written.

    Raises:
      UsageError: the extension is none of `FORMATS`, or MP4 is asked for without its extra.
    """
    extension = os.path.splitext(path)[1].lstrip(".").lower()
    if extension not in FORMATS:
        raise UsageError(f"cannot write a video as {path!r}: name it *.mp4, *.gif or *.webp")
    if extension == "mp4":
        _ffmpeg()
    return extension


def save_video(path: str, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes a video that players repeat, replacing what is there.

    MP4 is encoded as the frames come; GIF and WebP are held in memory first, so they are for short
    ones. Frames narrower than 256 pixels are enlarged by a whole factor. Alpha is laid on white.

    Args:
      path: where to, local or a URL; the extension tells the format.
      frames: [H, W, C] uint8, C = 1 to 4, all of one shape; at least one.
      fps: frames per second. A GIF counts in hundredths of a second and rounds.

    Raises:
      UsageError: see `format_of`.
      StorageError: the path cannot be written.
    """
    kind = format_of(path)
    pictures = (_opaque(enlarge(frame, _MIN_WIDTH)) for frame in frames)
    data = _encode_mp4(pictures, fps) if kind == "mp4" else _encode_animation(pictures, fps, kind)
    storage.write_bytes_atomic(path, data)


def closed_spline(keys: np.ndarray, frames: int) -> Iterator[np.ndarray]:
    """A smooth closed walk through points: a periodic Catmull-Rom spline.

    Args:
      keys: [K, ...]; the last one leads back to the first.
      frames: how many from one key to the next.

    Yields:
      K * frames points of shape [...]; frame k * frames is key k itself.
    """
    count = len(keys)
    for k in range(count):
        before, start, end, after = (keys[(k + i) % count] for i in (-1, 0, 1, 2))
        for t in np.arange(frames, dtype=np.float32) / np.float32(frames):
            linear = end - before
            square = 2 * before - 5 * start + 4 * end - after
            cube = 3 * (start - end) + after - before
            yield start + t / 2 * (linear + t * (square + t * cube))


def _opaque(frame: np.ndarray) -> Image.Image:
    picture = to_pillow(frame)
    if picture.mode not in ("LA", "RGBA"):
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _encode_animation(pictures: Iterator[Image.Image], fps: float, kind: str) -> bytes:
    first, *rest = pictures
    options = {"quality": 90} if kind == "webp" else {}
    buffer = io.BytesIO()
    first.save(
        buffer,
        format=kind.upper(),
        save_all=True,
        append_images=rest,
        duration=1000 / fps if kind == "gif" else round(1000 / fps),
        loop=0,
        **options,
    )
    return buffer.getvalue()


def _encode_mp4(pictures: Iterator[Image.Image], fps: float) -> bytes:
    """H.264 in the pixel format every player knows, which needs even sides."""
    first = next(pictures)
    with tempfile.TemporaryDirectory(
        dir=storage.temporary_directory()
    ) as folder:  # ffmpeg wants a file it can seek in
        path = os.path.join(folder, "video.mp4")
        writer = _ffmpeg().write_frames(path, first.size, fps=fps, quality=8, macro_block_size=2)
        writer.send(None)
        writer.send(first.tobytes())
        for picture in pictures:
            writer.send(picture.tobytes())
        writer.close()
        return storage.read_bytes(path)


def _ffmpeg() -> ModuleType:
    try:
        return importlib.import_module("imageio_ffmpeg")
    except ImportError as e:
        raise UsageError(
            "MP4 needs the extra 'video': pip install 'stylegan-trainer[video]', "
            "or name the video *.gif or *.webp"
        ) from e
