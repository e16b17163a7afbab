"""Every kind of image: right, by decoders that the converter does not use, or refused by name."""

from __future__ import annotations

import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.data import independent, kinds
from tests.data.independent import SIGNATURE, chunk, chunks
from tests.data.kinds import HEIGHT, WIDTH, bmp, png, samples, saved, tiff, tiff_of, written
from trainer.core.errors import DataError
from trainer.data import decoding, images, shards

RGB = samples(3, 8)
PNG = png(RGB, 8, 2)
JPEG = saved(np.kron(RGB, np.ones([3, 3, 1], np.uint8)), "JPEG", quality=90)


def encoded(data: bytes) -> images.EncodedImage:
    """At the size that it has."""
    width, height = decoding.decode(data).image.size
    return images.encode(data, images.ImageOptions((height, width)))


def read(result: images.EncodedImage) -> np.ndarray:
    """By the training's reader."""
    return shards.decode(tf.constant(result.data)).numpy()


@pytest.mark.parametrize("group", [kinds.pngs, kinds.jpegs, kinds.webps, kinds.tiffs, kinds.bmps])
def test_pixels_are_those_of_an_independent_decoder(group):
    for name, data in group().items():
        try:
            result = encoded(data)
        except DataError as error:
            raise AssertionError(name) from error
        np.testing.assert_array_equal(read(result), independent.pixels(data), err_msg=name)


@pytest.mark.parametrize(("bits", "channels"), [(16, 1), (16, 3), (16, 4), (12, 1)])
def test_more_than_8_bits_give_their_8_highest(bits, channels):
    values = samples(channels, bits)
    extra = {"t338": (2,)} if channels == 4 else {}
    data = tiff_of(values, bits, 1 if channels == 1 else 2, **extra)
    np.testing.assert_array_equal(read(encoded(data)), values >> (bits - 8))


def test_white_may_be_zero():
    for bits in (1, 8, 16):
        values = samples(1, bits)
        light = read(encoded(tiff_of(values, bits, 0))).astype(int)
        dark = read(encoded(tiff_of(values, bits, 1))).astype(int)
        np.testing.assert_array_equal(light, 255 - dark)


def test_a_transparent_grey_or_colour_is_compared_at_its_own_depth():
    grey = png(np.array([[[0], [1], [2], [3]]], np.uint8), 2, 0, tRNS=b"\0\3")
    np.testing.assert_array_equal(
        read(encoded(grey)), [[[0, 255], [85, 255], [170, 255], [255, 0]]]
    )
    colour = png(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8), 8, 2, tRNS=b"\0\1\0\2\0\3")
    np.testing.assert_array_equal(read(encoded(colour)), [[[1, 2, 3, 0], [1, 2, 4, 255]]])


def test_grey_with_alpha_of_16_bits_has_two_channels():
    values = samples(2, 16)
    np.testing.assert_array_equal(read(encoded(png(values, 16, 4))), values >> 8)


# ---- kinds that are refused ----------------------------------------------------------------------


def _tiff(**tags: tuple[int, ...]) -> bytes:
    return tiff_of(RGB, 8, 2, **tags)


def _animated(image_format: str) -> bytes:
    frame = Image.fromarray(255 - RGB)
    return saved(RGB, image_format, save_all=True, append_images=[frame])


REFUSED = {
    "signed": (written(np.ones((8, 8), np.int8), photometric="minisblack"), "8-bit signed"),
    "float": (written(np.ones((8, 8), np.float32), photometric="minisblack"), "32-bit floating"),
    "32-bit": (written(np.ones((8, 8), np.uint32), photometric="minisblack"), "32-bit"),
    "10-bit": (tiff_of(samples(1, 10), 10, 1), "10-bit"),
    "14-bit": (tiff_of(samples(1, 14), 14, 1), "14-bit"),
    "12-bit RGB": (tiff_of(samples(3, 12), 12, 2), "12-bit"),
    "12-bit, most significant first": (tiff_of(samples(1, 12), 12, 1, ">"), "12-bit, with the most"),
    "mixed bits": (_tiff(t258=(5, 6, 5)), "5, 6, 5 bits"),
    "CIELAB": (written(RGB, photometric="cielab"), "CIELAB"),
    "YCbCr": (tiff_of(RGB, 8, 6), "YCbCr"),
    "LogLuv": (tiff_of(RGB, 8, 32845), "LogLuv"),
    "raw of a camera": (tiff_of(samples(1, 8), 8, 32803), "camera"),
    "mask": (tiff_of(samples(1, 1), 1, 4), "mask"),
    "no photometric": (_tiff(t262=()), "does not say what its samples are"),
    "fourth sample without a name": (tiff_of(samples(4, 8), 8, 2), "4 samples to a pixel"),
    "two extra samples": (tiff_of(samples(5, 8), 8, 2, t338=(2, 0)), "ExtraSamples 2, 0"),
    "premultiplied grey": (tiff_of(samples(2, 8), 8, 1, t338=(1,)), "ExtraSamples 1"),
    "16-bit CMYK": (tiff_of(samples(4, 16), 16, 5), "16-bit"),
    "other inks": (tiff_of(samples(4, 8), 8, 5, t332=(2,)), "inks"),
    "bits reversed": (tiff_of(samples(1, 1), 1, 1, t266=(2,)), "FillOrder"),
    "palette of 8 bits": (tiff_of(samples(1, 2), 2, 3, t320=(9,) * 12), "palette has 8 bits"),
    "palette cut": (tiff_of(samples(1, 2), 2, 3, t320=(999,) * 9), "palette has 9 numbers"),
    "JPEG in TIFF": (written(RGB, photometric="rgb", compression="jpeg"), "compression is JPEG"),
    "fax": (tiff_of(samples(1, 1), 1, 1, t259=(4,)), "compression is CCITT"),
    "predictor of floats": (_tiff(t317=(3,)), "predictor"),
    "predictor without compression": (_tiff(t317=(2,)), "predictor"),
    "16 bits apart": (
        written(np.zeros([3, 8, 8], np.uint16), photometric="rgb", planarconfig="separate"),
        "lie apart",
    ),
    "strip missing": (_tiff(t278=(7,)), "1 of its 2 strips"),
    "strip short": (_tiff(t279=(99,)), "not as many"),
    "strip beyond the end": (_tiff(t273=(99999,)), "truncated within its pixels"),
    "strip in the header": (_tiff(t273=(2,)), "within its header"),
    "huge tiles": (_tiff(t273=(), t279=(), t322=(1 << 20,), t323=(1 << 20,), t324=(8,), t325=(1,)),
                   "strips or tiles have"),
    "pages": (_animated("TIFF"), "several pages"),
    "animated PNG": (_animated("PNG"), "2 frames"),
    "animated WebP": (_animated("WEBP"), "2 frames"),
    "PNG of 16 bits with a key": (png(samples(3, 16), 16, 2, tRNS=bytes(6)), "tRNS"),
    "PNG beyond its palette": (png(samples(1, 8), 8, 3, PLTE=bytes(30)), "palette of 10"),
    "PNG without a palette": (png(samples(1, 8), 8, 3), "no palette"),
    "PNG with an unknown chunk": (png(RGB, 8, 2, ABCD=b""), "a chunk ABCD"),
    "PNG with two headers": (PNG[:33] + PNG[8:], "two chunks IHDR"),
    "CgBI": (png(RGB, 8, 2).replace(SIGNATURE, SIGNATURE + chunk(b"CgBI", bytes(4))), "CgBI|IHDR"),
    "12-bit JPEG": (
        bytes(imagecodecs.jpeg8_encode(samples(1, 12)[..., 0], level=90, bitspersample=12)),
        "12 bits",
    ),
    "lossless JPEG": (bytes(imagecodecs.jpeg8_encode(RGB, lossless=True)), "lossless"),
    "arithmetic JPEG": (JPEG.replace(b"\xff\xc0", b"\xff\xc9", 1), "arithmetic"),
    "BMP of OS/2": (b"BM" + bytes(12) + struct.pack("<I", 12) + bytes(60), "header has 12 bytes"),
    "packed BMP": (bmp(samples(1, 8)[..., 0], 8, palette=bytes(1024), packing=1), "compressed"),
    "BMP beyond its palette": (bmp(samples(1, 8)[..., 0], 8, palette=b"\1\2\3\0" * 9), "palette of 9"),
    "BMP of two greys in 8 bits": (
        bmp(samples(1, 1)[..., 0], 8, palette=b"\0\0\0\0\xff\xff\xff\0"),
        "2 greys in 8 bits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    data, match = REFUSED[name]
    with pytest.raises(DataError, match=match) as caught:
        decoding.decode(data)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


# ---- what is kept --------------------------------------------------------------------------------


def test_kept_bytes_are_the_pixels_alone():
    for bare, data in [
        (PNG, png(RGB, 8, 2, iCCP=b"x\0\0" + zlib.compress(b"p"), tEXt=b"a\0b", sRGB=b"\0")),
        (JPEG, _with_metadata(JPEG)),
    ]:
        result = encoded(data)
        assert result.kept and result.data == bare != data


def _with_metadata(jpeg: bytes) -> bytes:
    """A JPEG with EXIF, a profile, a comment, and a preview behind its end."""
    found = b"".join(
        b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body
        for marker, body in [
            (0xE1, b"Exif\0\0" + kinds.exif(1)),
            (0xE2, b"ICC_PROFILE\0\1\1" + bytes(500)),
            (0xFE, b"hello"),
        ]
    )
    return jpeg[:20] + found + jpeg[20:] + jpeg


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("iCCP", b"profile\0\0" + zlib.compress(bytes(2 << 20))),
        ("zTXt", b"text\0\0" + zlib.compress(bytes(2 << 20))),
        ("iTXt", b"text\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
        ("tEXt", b"text\0" + bytes(2 << 20)),
        ("eXIf", b"garbage" * 9),
        ("pHYs", b""),
        ("gAMA", b"\0"),
    ],
)
def test_large_and_broken_metadata_is_left_out_of_a_png(name, body):
    result = encoded(png(RGB, 8, 2, **{name: body}))
    assert result.kept and len(result.data) == len(PNG)
    np.testing.assert_array_equal(read(result), RGB)


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "TIFF"])
def test_large_and_broken_metadata_is_left_out(image_format):
    options = {"lossless": True} if image_format == "WEBP" else {}
    plain = saved(RGB, image_format, **options)
    profile = saved(
        RGB, image_format, icc_profile=np.random.default_rng(0).bytes(2 << 20), **options
    )
    if image_format == "TIFF":  # a pointer to EXIF that leads nowhere, and one to GPS
        broken = tiff_of(RGB, 8, 2, t34665=(1 << 31,), t34853=(5,), t282=(0,), t700=(3,))
    else:
        broken = saved(RGB, image_format, exif=b"Exif\0\0" + b"garbage" * 9, **options)
    for data in (profile, broken):
        result = encoded(data)
        np.testing.assert_array_equal(read(result), read(encoded(plain)))
        assert len(result.data) < 5000


def test_orientation_is_found_in_a_block_that_is_broken_behind_it():
    turned = png(RGB, 8, 2, eXIf=kinds.exif(6)[:-4].replace(b"\0\1\1\x12", b"\0\x63\1\x12"))
    np.testing.assert_array_equal(read(encoded(turned)), np.rot90(RGB, -1))


# ---- damage --------------------------------------------------------------------------------------


def _rows(data: bytes) -> bytes:
    return zlib.decompress(b"".join(body for kind, body, _ in chunks(data) if kind == b"IDAT"))


def _repacked(stream: bytes) -> bytes:
    return b"".join([PNG[:33], chunk(b"IDAT", stream), chunk(b"IEND", b"")])


def test_a_png_that_lost_its_end_alone_is_whole():
    for missing in (1, 5, 12, 16):
        result = encoded(PNG[:-missing])
        assert result.kept and result.data == PNG


@pytest.mark.parametrize("missing", [17, 18, 20, 30, 200])
def test_a_png_cut_within_its_pixels_is_refused(missing):
    with pytest.raises(DataError, match="truncated within its pixels"):
        decoding.decode(PNG[:-missing])


def test_a_wrong_checksum_is_damage_only_where_nothing_else_vouches_for_the_pixels():
    at = PNG.index(b"IDAT")
    length = int.from_bytes(PNG[at - 4 : at], "big")
    wrong = bytearray(PNG)
    wrong[at + 4 + length] ^= 1  # the chunk's; that of the stream is right
    assert encoded(bytes(wrong)).data == PNG
    for kind in ("PLTE", "tRNS"):
        data = png(samples(1, 8), 8, 3, PLTE=bytes(768), tRNS=b"\1\2")
        place = data.index(kind.encode()) + 4
        with pytest.raises(DataError, match=f"checksum of its chunk {kind}"):
            decoding.decode(data[:place] + b"\7" + data[place + 1 :])


@pytest.mark.parametrize(
    ("stream", "match"),
    [
        (zlib.compress(_rows(PNG)[:-1]), "truncated within its pixels"),
        (zlib.compress(_rows(PNG) + b"\0"), "more pixels"),
        (zlib.compress(_rows(PNG) + bytes(100 << 20)), "more pixels"),  # a bomb
        (zlib.compress(b"\5" + _rows(PNG)[1:]), "cannot be decoded"),  # no filter has this number
        (zlib.compress(_rows(PNG))[:-4] + b"1234", "cannot be unpacked"),
        (b"", "truncated within its pixels"),
    ],
)
def test_a_png_with_other_pixels_than_its_size_says_is_refused(stream, match):
    with pytest.raises(DataError, match=match):
        decoding.decode(_repacked(stream))


def test_what_lies_behind_the_stream_of_a_png_is_left_out():
    stream = zlib.compress(_rows(PNG))
    assert encoded(_repacked(stream + b"rest")).data == _repacked(stream)


def test_a_jpeg_cut_within_its_pixels_is_refused():
    scan = JPEG.index(b"\xff\xda") + 20
    for end in range(scan, len(JPEG) - 8, 40):
        for data in (JPEG[:end], JPEG[:end] + b"\xff\xd9"):
            with pytest.raises(DataError, match="damaged"):
                decoding.decode(data)


def test_a_progressive_jpeg_without_its_last_scan_is_refused():
    data = saved(RGB, "JPEG", progressive=True)
    with pytest.raises(DataError, match="last scans are missing"):
        decoding.decode(data[: data.rindex(b"\xff\xda")] + b"\xff\xd9")


def test_a_jpeg_with_surplus_bytes_or_without_an_end_is_whole():
    expected = read(encoded(JPEG))
    for data in (JPEG[:-2], JPEG[:-1], JPEG[:-2] + b"surplus" + JPEG[-2:], JPEG + b"surplus"):
        result = encoded(data)
        assert result.kept
        np.testing.assert_array_equal(read(result), expected)
        np.testing.assert_array_equal(independent.pixels(result.data), expected)


def test_a_jpeg_of_endless_scans_is_refused():
    data = saved(RGB, "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    with pytest.raises(DataError, match="more than 200 scans"):
        decoding.decode(data[:start] + data[start:-2] * 300 + b"\xff\xd9")


def test_filling_in_a_jpeg_is_passed_over_in_one_go():
    filling = b"\xff" * (4 << 20)
    assert encoded(JPEG[:2] + filling + JPEG[2:]).kept
    with pytest.raises(DataError, match="damaged"):
        decoding.decode(JPEG[:-300] + filling)


@pytest.mark.parametrize("compression", ["zlib", "packbits", "lzw", None])
def test_a_tiff_cut_within_its_pixels_is_refused(compression):
    data = written(RGB, photometric="rgb", compression=compression)
    place, length = (
        next(struct.unpack_from("<I", data, n + 8)[0] for n in range(10, 200, 12)
             if struct.unpack_from("<H", data, n)[0] == tag)
        for tag in (273, 279)
    )  # fmt: skip
    body = data[place : place + length]
    code = {None: 1, "lzw": 5, "zlib": 8, "packbits": 32773}[compression]
    tags = {"t256": (WIDTH,), "t257": (HEIGHT,), "t258": (8,) * 3, "t262": (2,), "t277": (3,)}
    assert encoded(tiff([body], t259=(code,), **tags)).channels == 3
    for cut in (body[:-40], body[: len(body) // 2]):
        with pytest.raises(DataError, match="damaged"):
            decoding.decode(tiff([cut], t259=(code,), **tags))


def test_a_wrong_checksum_within_a_tiff_is_damage():
    stream = zlib.compress(RGB.tobytes())
    bad = stream[:-1] + bytes([stream[-1] ^ 1])
    tags = {"t256": (WIDTH,), "t257": (HEIGHT,), "t258": (8,) * 3, "t262": (2,), "t277": (3,)}
    assert encoded(tiff([stream], t259=(8,), **tags)).channels == 3
    with pytest.raises(DataError, match="cannot be unpacked"):
        decoding.decode(tiff([bad], t259=(8,), **tags))


def test_a_webp_shorter_than_it_says_is_refused():
    data = saved(RGB, "WEBP")
    for end in (len(data) - 1, len(data) // 2, 13):
        with pytest.raises(DataError, match="damaged"):
            decoding.decode(data[:end])


def test_a_bmp_shorter_than_it_says_is_refused():
    data = bmp(RGB, 24)
    for end in (len(data) - 1, len(data) // 2, 20):
        with pytest.raises(DataError, match="damaged"):
            decoding.decode(data[:end])
