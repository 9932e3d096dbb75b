"""A folder of every kind of broken and odd image file we could think of, made on the spot."""

import io
import os
import pickle
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, features


def make_hostile_folder(folder: Path) -> dict[str, bool]:
    """Fill a folder, and return for each file that is named as an image whether it is broken."""
    folder.mkdir(parents=True)
    for name, content in {**_broken_contents(), **_odd_contents()}.items():
        (folder / name).write_bytes(content)
    kinds = dict.fromkeys(_broken_contents(), True) | dict.fromkeys(_odd_contents(), False)

    good = encode(Image.fromarray(_noise(40, 48, 3)), "JPEG")
    (folder / "dangling link.jpg").symlink_to("nowhere")
    (folder / "link to itself.jpg").symlink_to("link to itself.jpg")
    (folder / "link to a folder.jpg").symlink_to("..")  # has been entered already
    (folder / "link to a device.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket must be short
        server.bind("socket.jpg")
        os.chdir(here)
    kinds |= dict.fromkeys(
        ["dangling link.jpg", "link to itself.jpg", "link to a device.jpg", "pipe.jpg", "socket.jpg"], True
    )
    (folder / "forbidden.jpg").write_bytes(good)
    (folder / "forbidden.jpg").chmod(0)
    kinds["forbidden.jpg"] = os.geteuid() != 0  # root may read anything

    (folder / "directory.jpg").mkdir()
    (folder / "directory.jpg" / "inside.jpg").write_bytes(good)
    (folder / "link.jpg").symlink_to("baseline.jpg")
    kinds |= dict.fromkeys(["inside.jpg", "link.jpg"], False)
    for name in (
        b"no utf-8 \xff\xfe.jpg",
        b"line\nbreak.jpg",
        "Ünïcödé 图像 🐈.JPG".encode(),
        b"%s {} ' \".jpg",
    ):
        (folder / os.fsdecode(name)).write_bytes(good)
        kinds[os.fsdecode(name)] = False
    (folder / os.fsdecode(b"empty \xff.jpg")).write_bytes(b"")
    kinds[os.fsdecode(b"empty \xff.jpg")] = True

    for name in ("Thumbs.db", "notes.txt", "labels.json", "no suffix", ".hidden.jpg"):  # not images by their names
        (folder / name).write_bytes(good)
    return kinds


def encode(image: Image.Image, kind: str, **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


def _noise(*shape: int, dtype: str = "u1") -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def _png(width: int, height: int, depth: int, color: int, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, for what Pillow will not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _broken_contents() -> dict[str, bytes]:
    image = Image.fromarray(_noise(40, 48, 3))
    jpeg, png, gif, tiff, webp, bmp = (encode(image, kind) for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    bomb_gif = bytearray(gif)
    bomb_gif[6:10] = b"\xff" * 4  # 65,535 x 65,535 pixels
    return {
        "empty.jpg": b"",
        "one byte.jpg": b"\xff",
        "signature alone.jpg": b"\xff\xd8\xff\xe0",
        "signature alone.png": png[:8],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated header.jpg": jpeg[:100],
        "truncated.png": png[: len(png) // 2],
        "truncated.gif": gif[: len(gif) // 2],
        "truncated.tif": tiff[:40],
        "truncated.webp": webp[: len(webp) // 2],
        "truncated.bmp": bmp[: len(bmp) // 2],
        "bit flipped.png": bytes(flipped),
        "zeros.jpg": bytes(5000),
        "noise.jpg": _noise(5000).tobytes(),
        "text.jpg": b"this is no image\n" * 50,
        "not found.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "paper.jpg": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>",
        "pickle.jpg": pickle.dumps({"image": list(range(100))}),
        "array.png": np.lib.format.magic(1, 0) + bytes(200),
        "archive.jpg": b"PK\x03\x04" + bytes(100),
        "compressed.png": b"\x1f\x8b\x08\x00" + bytes(100),
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "phone.jpg": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100),
        "bomb.png": _png(100_000, 100_000, 8, 2, bytes(1000)),
        "bomb.gif": bytes(bomb_gif),
        "no pixels.png": _png(0, 0, 8, 2, b""),
        "text bomb.png": _png(1, 1, 8, 0, b"\0\0", (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 1))),
        "bad colors.png": _png(1, 1, 7, 9, b"\0\0"),
        "header alone.ppm": b"P6 10 10 255\n",
    }


def _odd_contents() -> dict[str, bytes]:
    pixels = _noise(40, 48, 3)
    image = Image.fromarray(pixels)
    palette = image.quantize(16)
    alpha = Image.fromarray(_noise(40, 48, 4))
    grey16 = Image.fromarray(_noise(40, 48, dtype="u2"))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(image, "JPEG", exif=exif)
    jpeg = encode(image, "JPEG")
    frames = [Image.fromarray(np.roll(pixels, i, 0)) for i in range(3)]
    odd = {
        "baseline.jpg": jpeg,
        "progressive.jpeg": encode(image, "JPEG", progressive=True),
        "subsampled.jpe": encode(image, "JPEG", subsampling=2),
        "grey.jpg": encode(image.convert("L"), "JPEG"),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "cmyk.tif": encode(image.convert("CMYK"), "TIFF"),
        "lab.tif": encode(Image.merge("LAB", image.split()), "TIFF"),
        "turned.jpg": turned,
        "damaged exif.jpg": jpeg[:2] + b"\xff\xe1\x00\x12Exif\0\0MM\0*\xff\xff\xff\xff\xff\xff" + jpeg[2:],
        "data behind.jpg": jpeg + b"more" * 100,
        "one pixel.png": encode(Image.new("RGB", (1, 1), "red"), "PNG"),
        "one pixel.gif": encode(Image.new("P", (1, 1)), "GIF"),
        "one row.png": encode(Image.new("RGB", (30_000, 1), "red"), "PNG"),
        "one column.png": encode(Image.new("RGB", (1, 30_000), "red"), "PNG"),
        "one bit.png": encode(image.convert("1"), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "palette, one transparent.png": encode(palette, "PNG", transparency=3),
        "palette, many transparent.png": encode(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "color transparent.png": encode(image, "PNG", transparency=(1, 2, 3)),
        "grey and alpha.png": encode(alpha.convert("LA"), "PNG"),
        "alpha.png": encode(alpha, "PNG"),
        "alpha.webp": encode(alpha, "WEBP"),
        "alpha.tif": encode(alpha, "TIFF"),
        "16 bit.png": encode(grey16, "PNG"),
        "16 bit.tif": encode(grey16, "TIFF"),
        "16 bit.pgm": encode(grey16, "PPM"),
        "16 bit colors.png": _png(2, 2, 16, 2, (b"\0" + bytes(range(12))) * 2),
        "32 bit.tif": encode(Image.fromarray(_noise(40, 48, dtype="i4")), "TIFF"),
        "floating point.tif": encode(Image.fromarray(np.linspace(0, 1, 1920, dtype="f4").reshape(40, 48)), "TIFF"),
        "not finite.tif": encode(Image.fromarray(np.full((9, 9), np.nan, "f4")), "TIFF"),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "animated.png": encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "several pages.tif": encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "several pictures.jpg": encode(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "interlaced.gif": encode(palette, "GIF", interlace=1),
        "run lengths.bmp": encode(palette, "BMP"),
        "a png.jpg": encode(image, "PNG"),
        "a jpeg.png": jpeg,
        "a webp.JPEG": encode(image, "WEBP"),
    }
    if features.check("avif"):
        odd["coded.avif"] = encode(image, "AVIF")
    if features.check("jpg_2000"):
        odd["coded.jp2"] = encode(image, "JPEG2000")
    return odd
