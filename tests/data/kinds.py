"""Small sound images of every kind that PNG, JPEG, WebP, TIFF and BMP have."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from tests.data.independent import SIGNATURE, chunk

HEIGHT, WIDTH = 13, 18
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))


def samples(channels: int, bits: int, seed: int = 0) -> np.ndarray:
    """[HEIGHT, WIDTH, channels] of `bits`, smooth enough for JPEG and WebP, with noise on top."""
    rng = np.random.default_rng(seed)
    y, x, c = np.ogrid[:HEIGHT, :WIDTH, :channels]
    wave = (
        0.5
        + 0.4 * np.sin(x / 4 + y / 3 + c * 2 + seed)
        + rng.uniform(-0.1, 0.1, [HEIGHT, WIDTH, channels])
    )
    dtype = np.uint8 if bits <= 8 else np.uint16
    return np.rint(wave * ((1 << bits) - 1)).astype(dtype)


def packed(values: np.ndarray, bits: int) -> bytes:
    """Samples of rows, each padded to whole bytes, most significant bits first."""
    rows = values.reshape(values.shape[0], -1)
    unpacked = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(unpacked.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


# ---- PNG -----------------------------------------------------------------------------------------


def _filtered(values: np.ndarray, bits: int) -> bytes:
    rows = packed(values, bits)
    size = len(rows) // len(values)
    return b"".join(b"\0" + rows[n * size : (n + 1) * size] for n in range(len(values)))


def png(
    values: np.ndarray, bits: int, colour_type: int, *, interlaced: bool = False, **extra: bytes
) -> bytes:
    """A PNG of samples [H, W, C]; `extra` are chunks before the pixels."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced)
    if interlaced:
        passes = [(x, y, dx, dy) for x, y, dx, dy in (*_ADAM7, (0, 1, 1, 2))]
        parts = [values[y::dy, x::dx] for x, y, dx, dy in passes]
    else:
        parts = [values]
    stream = zlib.compress(b"".join(_filtered(part, bits) for part in parts if part.size))
    half = len(stream) // 2
    return SIGNATURE + b"".join(
        [
            chunk(b"IHDR", header),
            *(chunk(kind.encode(), body) for kind, body in extra.items()),
            chunk(b"IDAT", stream[:half]),
            chunk(b"IDAT", stream[half:]),
            chunk(b"IEND", b""),
        ]
    )


def exif(orientation: int) -> bytes:
    """An EXIF block, without the name that JPEG puts before it."""
    return Image.Exif.tobytes(_with_orientation(orientation)).removeprefix(b"Exif\0\0")


def _with_orientation(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def pngs() -> dict[str, bytes]:
    """PNGs of all colour types and depths, with and without interlacing and transparent colours."""
    depths = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
    found = {}
    for kind, bits in ((kind, bits) for kind, each in depths.items() for bits in each):
        values = samples(channels[kind], bits, seed=bits)
        first = values[5, 7].astype(">u2").tobytes()
        palette = np.random.default_rng(1).integers(0, 256, 3 << bits if kind == 3 else 3, np.uint8)
        extra = {"PLTE": palette.tobytes()} if kind == 3 else {}
        for interlaced in (False, True):
            name = f"png {kind} {bits}-bit{' interlaced' * interlaced}"
            found[name] = png(values, bits, kind, interlaced=interlaced, **extra)
            if kind == 0 or (kind == 2 and bits == 8):
                found[name + " key"] = png(values, bits, kind, interlaced=interlaced, tRNS=first)
            if kind == 3:
                alpha = bytes([0, 128])
                found[name + " key"] = png(
                    values, bits, kind, interlaced=interlaced, **extra, tRNS=alpha
                )
    rgb = samples(3, 8)
    found["png rotated"] = png(rgb, 8, 2, eXIf=exif(6))
    found["png metadata"] = png(
        rgb,
        8,
        2,
        gAMA=struct.pack(">I", 10000),
        iCCP=b"x\0\0" + zlib.compress(bytes(100)),
        tEXt=b"a\0b",
        pHYs=bytes(9),
        PLTE=bytes(range(12)),
        sBIT=b"\5\6\5",
        bKGD=bytes(6),
    )
    return found


# ---- JPEG, WebP ----------------------------------------------------------------------------------


def saved(values: np.ndarray, image_format: str, mode: str | None = None, **options: Any) -> bytes:
    """By Pillow."""
    buffer = io.BytesIO()
    image = Image.fromarray(values.squeeze())
    (image.convert(mode) if mode else image).save(buffer, image_format, **options)
    return buffer.getvalue()


def jpegs() -> dict[str, bytes]:
    """Baseline and progressive JPEGs of all usual samplings, grey, RGB, CMYK and YCCK."""
    rgb, grey = samples(3, 8), samples(1, 8)
    large = np.kron(rgb, np.ones([3, 3, 1], np.uint8))
    found = {
        "jpeg grey": saved(grey, "JPEG"),
        "jpeg grey rotated": saved(grey, "JPEG", exif=_with_orientation(8)),
    }
    for subsampling, progressive in itertools.product((0, 1, 2), (False, True)):
        name = f"jpeg {('444', '422', '420')[subsampling]}{' progressive' * progressive}"
        options = {"subsampling": subsampling, "progressive": progressive}
        found[name] = saved(rgb, "JPEG", quality=90, **options)
        found[name + " large"] = saved(large, "JPEG", quality=60, **options)
    found["jpeg restarts"] = saved(large, "JPEG", restart_marker_blocks=2)
    found["jpeg optimized"] = saved(large, "JPEG", optimize=True)
    found["jpeg rotated"] = saved(rgb, "JPEG", exif=_with_orientation(6), comment=b"a comment")
    found["jpeg rgb"] = saved(rgb, "JPEG", keep_rgb=True)
    found["jpeg cmyk"] = saved(rgb, "JPEG", "CMYK", quality=95)
    found["jpeg sampled 4x1"] = bytes(imagecodecs.jpeg8_encode(large, level=90, subsampling="411"))
    found["jpeg sampled 1x2"] = bytes(imagecodecs.jpeg8_encode(large, level=90, subsampling="440"))
    return found


def webps() -> dict[str, bytes]:
    """Lossy and lossless WebPs, with and without alpha and metadata."""
    rgb, rgba = samples(3, 8), samples(4, 8)
    found = {}
    for lossless in (False, True):
        name = "webp lossless" if lossless else "webp lossy"
        found[name] = saved(rgb, "WEBP", lossless=lossless)
        found[name + " alpha"] = saved(rgba, "WEBP", lossless=lossless, exact=True)
    found["webp rotated"] = saved(rgb, "WEBP", exif=_with_orientation(6), icc_profile=bytes(200))
    return found


# ---- TIFF ----------------------------------------------------------------------------------------


def tiff(strips: list[bytes], order: str = "<", **tags: tuple[int, ...]) -> bytes:
    """A TIFF with just these tags, by their numbers as 't256', and the strips' places."""
    out = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    places = []
    for strip in strips:
        places.append(len(out))
        out += strip + b"\0" * (len(strip) % 2)
    lengths = tuple(map(len, strips))
    known = {int(name[1:]): values for name, values in tags.items()}
    known = {273: tuple(places), 279: lengths, **known}
    entries = b""
    for tag, values in sorted(known.items()):
        if not values:
            continue
        kind, code = (4, "I") if tag in {273, 279} or max(values) > 65535 else (3, "H")
        body = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(body) > 4:
            place, length = len(out), len(body)
            out += body + b"\0" * (length % 2)
            body = struct.pack(order + "I", place)
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + body.ljust(4, b"\0")
    struct.pack_into(order + "I", out, 4, len(out))
    return bytes(out + struct.pack(order + "H", len(entries) // 12) + entries + bytes(4))


def tiff_of(
    values: np.ndarray, bits: int, photometric: int, order: str = "<", **tags: Any
) -> bytes:
    """One strip, not compressed."""
    channels = values.shape[2]
    body = values.astype(order + "u2").tobytes() if bits == 16 else packed(values, bits)
    return tiff(
        [body],
        order,
        **{
            "t256": (WIDTH,),
            "t257": (HEIGHT,),
            "t258": (bits,) * channels,
            "t262": (photometric,),
            "t277": (channels,),
            "t278": (HEIGHT,),
            **tags,
        },
    )


def written(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, metadata=None, **options)
    return buffer.getvalue()


def tiffs() -> dict[str, bytes]:
    """TIFFs that are taken."""
    found: dict[str, bytes] = {}
    for photometric, bits, order in itertools.product((0, 1), (1, 2, 4, 8, 16), "<>"):
        found[f"tiff {photometric} {bits}-bit {order}"] = tiff_of(
            samples(1, bits, seed=bits), bits, photometric, order
        )
    found["tiff 1 12-bit"] = tiff_of(samples(1, 12), 12, 1)
    for bits, order in itertools.product((1, 2, 4, 8), "<>"):
        palette = np.random.default_rng(bits).integers(0, 65536, 3 << bits).tolist()
        values = samples(1, bits, seed=bits)
        found[f"tiff palette {bits}-bit {order}"] = tiff_of(
            values, bits, 3, order, t320=tuple(palette)
        )
    compressions = (None, "lzw", "zlib", "packbits")
    for compression, bits, order, tile in itertools.product(
        compressions, (8, 16), "<>", (None, (16, 16))
    ):
        for channels, colours, extra in (
            (1, "minisblack", None),
            (3, "rgb", None),
            (4, "rgb", "unassalpha"),
            (4, "rgb", "unspecified"),
        ):
            name = f"tiff {colours} {channels} {extra} {bits}-bit {compression} {order} {tile}"
            values = samples(channels, bits, seed=channels)
            options: dict[str, Any] = {"rowsperstrip": 5} if tile is None else {"tile": tile}
            if extra:
                options["extrasamples"] = [extra]
            found[name] = written(
                values.squeeze(),
                photometric=colours,
                compression=compression,
                byteorder=order,
                predictor=2 if compression in {"lzw", "zlib"} else None,
                **options,
            )
    rgb = samples(3, 8)
    for compression, tile in itertools.product(compressions, (None, (16, 16))):
        found[f"tiff planes {compression} {tile}"] = written(
            np.ascontiguousarray(np.moveaxis(rgb, -1, 0)),
            photometric="rgb",
            planarconfig="separate",
            compression=compression,
            tile=tile,
        )
    premultiplied = samples(4, 8)
    premultiplied[..., :3] = premultiplied[..., :3].astype(int) * premultiplied[..., 3:] // 255
    found["tiff premultiplied"] = written(
        premultiplied, photometric="rgb", extrasamples=["assocalpha"]
    )
    found["tiff grey alpha"] = written(
        samples(2, 8), photometric="minisblack", extrasamples=["unassalpha"], planarconfig="contig"
    )
    found["tiff cmyk"] = written(samples(4, 8), photometric="separated")
    found["tiff cmyk lzw"] = written(samples(4, 8), photometric="separated", compression="lzw")
    found["tiff big"] = written(rgb, photometric="rgb", bigtiff=True)
    for orientation, compression in itertools.product(range(1, 9), (None, "lzw")):
        found[f"tiff rotated {orientation} {compression}"] = written(
            rgb,
            photometric="rgb",
            compression=compression,
            extratags=[(274, 3, 1, orientation, True)],
        )
    return found


# ---- BMP -----------------------------------------------------------------------------------------


def bmp(
    values: np.ndarray,
    bits: int,
    *,
    palette: bytes = b"",
    masks: bytes = b"",
    packing: int = 0,
    top_down: bool = False,
    header: int = 40,
) -> bytes:
    """A BMP of pixels [H, W] as they are stored, or of bytes [H, W, N]."""
    height, width = values.shape[:2]
    rows = values if top_down else values[::-1]
    if bits > 8 and rows.dtype != np.uint8:
        body = rows.astype("<u2" if bits == 16 else "<u4").tobytes()
    else:
        body = packed(rows, min(bits, 8))
    size = len(body) // height
    padded = b"".join(body[n * size : (n + 1) * size] + b"\0" * (-size % 4) for n in range(height))
    start = 14 + header + len(palette) + (len(masks) if header == 40 else 0)
    signed, colours = -height if top_down else height, len(palette) // 4
    info = struct.pack("<IiiHHII", header, width, signed, 1, bits, packing, len(padded))
    info += struct.pack("<iiII", 2835, 2835, colours, 0)
    info = info + masks if header == 40 else (info + masks).ljust(header, b"\0")
    return b"BM" + struct.pack("<IHHI", start + len(padded), 0, 0, start) + info + palette + padded


def bmps() -> dict[str, bytes]:
    """BMPs of all depths."""
    found = {}
    rng = np.random.default_rng(2)
    for bits in (1, 4, 8):
        palette = rng.integers(0, 256, [1 << bits, 4], np.uint8)
        palette[:, 3] = 0
        values = samples(1, bits, seed=bits)[..., 0]
        found[f"bmp {bits}-bit"] = bmp(values, bits, palette=palette.tobytes())
    greys = np.repeat(np.arange(256, dtype=np.uint8), 4).tobytes()
    found["bmp grey"] = bmp(samples(1, 8)[..., 0], 8, palette=greys)
    found["bmp 24-bit"] = bmp(samples(3, 8), 24)
    found["bmp 24-bit top down"] = bmp(samples(3, 8), 24, top_down=True)
    found["bmp 24-bit v5"] = bmp(samples(3, 8), 24, header=124)
    found["bmp 32-bit"] = bmp(samples(4, 8), 32)
    words = rng.integers(0, 1 << 15, [HEIGHT, WIDTH], np.uint16)
    found["bmp 16-bit"] = bmp(words, 16)
    found["bmp 16-bit 565"] = bmp(
        words, 16, packing=3, masks=struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    )
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    found["bmp 32-bit alpha"] = bmp(samples(4, 8), 32, packing=3, masks=masks, header=124)
    return found
