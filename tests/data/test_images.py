"""One image in, one image out: sizes, modes, kept bytes, hostile bytes."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.core.errors import DataError, UsageError
from trainer.data import images, shards
from trainer.data.images import ImageOptions, encode

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int) -> Image.Image:
    """Smooth enough for JPEG to be near."""
    small = RNG.integers(0, 256, [4, 4, channels], np.uint8).squeeze()
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def save(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def decoded_by_tensorflow(data: bytes) -> np.ndarray:
    return shards.decode(tf.constant(data)).numpy()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_are_kept_when_nothing_has_to_change(image_format, channels):
    data = save(noise(24, 40, channels), image_format)
    result = encode(data, ImageOptions((24, 40)))
    assert result.kept and result.data == data and result.format == image_format.lower()
    assert (result.height, result.width, result.channels) == (24, 40, channels)


@pytest.mark.parametrize(
    ("channels", "image_format", "options"),
    [
        (1, "PNG", {}),
        (2, "PNG", {}),
        (3, "PNG", {}),
        (4, "PNG", {}),
        (1, "JPEG", {}),
        (3, "JPEG", {"quality": 75}),
        (3, "JPEG", {"quality": 95, "subsampling": 0}),
        (3, "JPEG", {"quality": 60, "progressive": True}),
    ],
)
def test_kept_bytes_hold_the_same_pixels_for_tensorflow(channels, image_format, options):
    data = save(noise(37, 51, channels), image_format, **options)
    result = encode(data, ImageOptions((37, 51)))
    assert result.kept
    expected = pixels(data).reshape(37, 51, channels)
    np.testing.assert_array_equal(decoded_by_tensorflow(result.data), expected)


def _interlaced_png() -> bytes:
    """A 2x2 grey PNG with Adam7 passes: (0,0), then (1,0), then the second row."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 1)
    passes = zlib.compress(bytes([0, 10, 0, 20, 0, 30, 40]))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", passes), chunk(b"IEND", b"")]
    )


def test_interlaced_png_reads_the_same():
    result = encode(_interlaced_png(), ImageOptions((2, 2)))
    np.testing.assert_array_equal(decoded_by_tensorflow(result.data)[..., 0], [[10, 20], [30, 40]])


@pytest.mark.parametrize("image_format", ["WEBP", "BMP", "TIFF"])
def test_other_formats_become_png_without_loss(image_format):
    image = noise(24, 40, 3)
    options = {"lossless": True} if image_format == "WEBP" else {}
    result = encode(save(image, image_format, **options), ImageOptions((24, 40)))
    assert not result.kept and result.format == "png"
    np.testing.assert_array_equal(decoded_by_tensorflow(result.data), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_turns_the_image_upright(image_format, orientation):
    # Four flat quarters survive JPEG, and tell all eight orientations apart.
    upright = np.kron(np.array([[0, 85], [170, 255]], np.uint8), np.ones([16, 16], np.uint8))
    upright = np.repeat(upright[:, :, None], 3, axis=2)
    # How the camera stored what is upright, by the definition of the tag.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(np.ascontiguousarray(stored)), image_format, exif=exif)
    result = encode(data, ImageOptions((32, 32)))
    assert result.kept == (orientation == 1 and image_format in {"JPEG", "PNG"})
    np.testing.assert_allclose(decoded_by_tensorflow(result.data), upright, atol=4)


def test_16_bit_grey_keeps_the_high_byte():
    values = np.array([[0, 255, 256, 0x1234], [0x8000, 0xFF00, 0xFFFF, 0x7FFF]], np.uint16)
    result = encode(save(Image.fromarray(values)), ImageOptions((2, 4)))
    assert not result.kept and result.channels == 1
    np.testing.assert_array_equal(decoded_by_tensorflow(result.data)[..., 0], values >> 8)


def test_16_bit_colour_png_is_not_kept():
    image = tf.constant(RNG.integers(0, 65536, [5, 6, 3]), tf.uint16)
    result = encode(tf.io.encode_png(image).numpy(), ImageOptions((5, 6)))
    assert not result.kept and result.channels == 3
    np.testing.assert_array_equal(decoded_by_tensorflow(result.data), image.numpy() >> 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_samples_are_refused(mode):
    data = save(Image.new(mode, (4, 4), 7), "TIFF")
    with pytest.raises(DataError, match="32-bit"):
        encode(data, ImageOptions((4, 4)))


def test_palette_becomes_colour():
    image = noise(16, 16, 3).quantize(16)
    result = encode(save(image), ImageOptions((16, 16)))
    assert not result.kept and result.channels == 3
    np.testing.assert_array_equal(
        decoded_by_tensorflow(result.data), np.asarray(image.convert("RGB"))
    )


def test_transparent_palette_entry_shows_the_background():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 1, 2, 3])
    image.putpixel((1, 0), 1)
    data = save(image, transparency=0)
    result = encode(data, ImageOptions((1, 2), background="#ff8000"))
    np.testing.assert_array_equal(decoded_by_tensorflow(result.data), [[[255, 128, 0], [1, 2, 3]]])
    assert encode(data, ImageOptions((1, 2))).channels == 4


def test_transparent_grey_of_16_bits_becomes_alpha():
    data = save(Image.fromarray(np.array([[0x1200, 0x3400]], np.uint16)), transparency=0x3400)
    result = encode(data, ImageOptions((1, 2)))
    assert result.channels == 2
    np.testing.assert_array_equal(decoded_by_tensorflow(result.data), [[[0x12, 255], [0x34, 0]]])


def test_cmyk_jpeg_becomes_rgb():
    image = noise(16, 16, 3)
    data = save(image.convert("CMYK"), "JPEG", quality=100)
    result = encode(data, ImageOptions((16, 16)))
    assert not result.kept and result.channels == 3
    np.testing.assert_allclose(decoded_by_tensorflow(result.data), np.asarray(image), atol=12)


def test_half_transparent_pixels_mix_with_the_background():
    image = Image.fromarray(np.array([[[200, 0, 100, 128]]], np.uint8))
    result = encode(save(image), ImageOptions((1, 1), channels=3, background="white"))
    expected = np.array([[[200, 0, 100]]]) * 128 / 255 + 255 * 127 / 255
    np.testing.assert_allclose(decoded_by_tensorflow(result.data), expected, atol=1)


def test_transparency_without_a_background_is_refused_unless_it_is_kept():
    data = save(Image.fromarray(np.array([[[200, 0, 100, 128]]], np.uint8)))
    with pytest.raises(DataError, match="--background=white"):
        encode(data, ImageOptions((1, 1), channels=3))
    assert encode(data, ImageOptions((1, 1))).channels == 4


def test_opaque_alpha_may_go():
    opaque = np.array([[[200, 0, 100, 255]]], np.uint8)
    result = encode(save(Image.fromarray(opaque)), ImageOptions((1, 1), channels=3))
    np.testing.assert_array_equal(decoded_by_tensorflow(result.data), opaque[..., :3])


def test_grey_with_alpha_on_a_colour_is_a_colour_image():
    data = save(Image.new("LA", (1, 1), (50, 0)))
    assert encode(data, ImageOptions((1, 1), background="white")).channels == 1
    red = encode(data, ImageOptions((1, 1), background="red"))
    np.testing.assert_array_equal(decoded_by_tensorflow(red.data), [[[255, 0, 0]]])


def test_hidden_colour_does_not_bleed_when_scaled():
    rgba = np.zeros([4, 4, 4], np.uint8)
    rgba[:, :2] = [255, 0, 0, 255]
    rgba[:, 2:] = [0, 255, 0, 0]  # invisible green
    result = encode(save(Image.fromarray(rgba)), ImageOptions((1, 1), filter="box"))
    red, green, _, alpha = decoded_by_tensorflow(result.data)[0, 0]
    assert (red, green) == (255, 0) and 127 <= alpha <= 128


def test_center_crop_takes_the_middle():
    columns = np.tile(np.arange(12, dtype=np.uint8) * 20, [4, 1])
    result = encode(save(Image.fromarray(columns)), ImageOptions((4, 4)))
    np.testing.assert_array_equal(decoded_by_tensorflow(result.data)[..., 0], columns[:, 4:8])
    wide = encode(save(Image.fromarray(columns)), ImageOptions((2, 4), filter="box"))
    assert (wide.height, wide.width) == (2, 4) and not wide.stretched
    middle = columns[:, 2:10].reshape(2, 2, 4, 2).mean((1, 3))
    np.testing.assert_array_equal(decoded_by_tensorflow(wide.data)[..., 0], middle)


def test_box_filter_averages():
    image = noise(32, 32, 1)
    result = encode(save(image), ImageOptions((8, 8), filter="box"))
    expected = np.asarray(image).astype(float).reshape(8, 4, 8, 4).mean((1, 3))
    np.testing.assert_allclose(decoded_by_tensorflow(result.data)[..., 0], expected, atol=1.01)


def test_too_small_for_a_crop_is_refused_and_scaled_up_only_when_asked():
    data = save(noise(20, 40, 3))
    with pytest.raises(DataError, match="40x20, too small for a crop of 32x32"):
        encode(data, ImageOptions((32, 32)))
    result = encode(data, ImageOptions((32, 32), crop="none"))
    assert result.enlarged and result.stretched
    assert pixels(result.data).shape == (32, 32, 3)


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    target=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    crop=st.sampled_from(images.CROPS),
)
def test_any_size_comes_out_right_or_is_too_small(size, target, crop):
    data = save(Image.new("L", size, 9))
    try:
        result = encode(data, ImageOptions((target[1], target[0]), crop=crop))
    except DataError as error:
        assert crop == "center" and "too small" in str(error)
        assert size[0] < target[0] or size[1] < target[1]
    else:
        assert pixels(result.data).shape == (target[1], target[0])
        assert crop == "none" or (size[0] >= target[0] and size[1] >= target[1])


SOUND = [
    save(noise(20, 20, channels), image_format)
    for channels, image_format in [(4, "PNG"), (3, "JPEG"), (3, "WEBP"), (3, "BMP"), (3, "TIFF")]
]


@settings(max_examples=200)
@given(st.data())
def test_broken_bytes_raise_nothing_but_a_data_error(draw):
    data = bytearray(draw.draw(st.sampled_from(SOUND)))
    for _ in range(draw.draw(st.integers(0, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    cut = bytes(data[: draw.draw(st.integers(0, len(data)))])
    try:
        result = encode(cut, ImageOptions((8, 8), crop="none", background="white"))
    except DataError as error:
        assert str(error)
    else:
        assert pixels(result.data).shape[:2] == (8, 8)


@pytest.mark.parametrize("data", SOUND[:4])
def test_a_truncated_image_is_an_error(data):
    with pytest.raises(DataError):
        encode(data[: len(data) * 2 // 3], ImageOptions((20, 20)))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_refused(image_format):
    frames = [noise(16, 16, 3), noise(16, 16, 3)]
    data = save(frames[0], image_format, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="2 frames|several pages"):
        encode(data, ImageOptions((16, 16)))


def test_a_decompression_bomb_is_refused_before_it_is_unpacked():
    for side in (10_000, 16_000):
        data = save(Image.new("1", (side, side)))
        with pytest.raises(DataError, match=r"pixels.* limit"):
            encode(data, ImageOptions((16, 16)))


def test_what_is_no_image_says_so():
    with pytest.raises(DataError, match="not a PNG, JPEG, WebP, BMP or TIFF"):
        encode(b"hello", ImageOptions((16, 16)))
    with pytest.raises(DataError, match="empty"):
        encode(b"", ImageOptions((16, 16)))
    with pytest.raises(DataError, match="not a PNG"):
        encode(save(Image.new("L", (4, 4)), "GIF"), ImageOptions((4, 4)))


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": (0, 8)},
        {"resolution": (8, 20000)},
        {"resolution": (8, 8), "crop": "left"},
        {"resolution": (8, 8), "filter": "nearest"},
        {"resolution": (8, 8), "channels": 5},
        {"resolution": (8, 8), "background": "wite"},
    ],
)
def test_wrong_options_are_usage_errors(options):
    with pytest.raises(UsageError):
        ImageOptions(**options)
