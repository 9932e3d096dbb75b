"""From the bytes of an image file to colours of 8 bits: what every data module reads images by."""

import io
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

# What Pillow decodes by itself. Some of its other formats start programs (PostScript) or fetch further files.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_ASPECT = 32  # of a longer image only the middle is kept: crops see no more, and resizing it takes gigabytes

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: str | Path | bytes | Image.Image, upright: bool = True) -> Image.Image:
    """Read an image as RGB of 8 bits, whatever it holds.

    Of an animation the first picture is taken; transparent images are laid on white; 16 bits and floating point are
    scaled to 8 bits; of an image over 32 times longer than wide the middle is kept.

    Args:
        source: A file, the bytes of one, or an image that has been opened already.
        upright: Turn it as its EXIF orientation says.

    Raises:
        Exception: Of nearly any kind, where it is no image that can be read: decoders raise many on damaged bytes.
    """
    if isinstance(source, Image.Image):
        return _finish(source, upright)
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    else:
        if not stat.S_ISREG(os.stat(source).st_mode):  # opening a pipe would wait forever, a device never end
            raise OSError("it is no regular file")
        file = open(source, "rb")
    with file:
        if not file.read(1):
            raise OSError("the file is empty")
        file.seek(0)
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise OSError("it is of no known image format") from None
        with image:
            return _finish(image, upright)


def _finish(image: Image.Image, upright: bool) -> Image.Image:
    image.load()
    turn = _TURNS.get(_orientation(image)) if upright else None
    image = _to_rgb(image)
    if turn is not None:
        image = image.transpose(turn)
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        w, h = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
        x, y = (width - w) // 2, (height - h) // 2
        image = image.crop((x, y, x + w, y + h))
    return image


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged metadata says nothing about the pixels
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # which convert("RGB") would clip at 255
        image = _to_8_bits(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        # As it is shown on paper: what colours transparent pixels have is left to chance.
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than 8 bits by what white is: 1, 255 or 65535, or its own range where none fits."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # Pillow opens 16 bits as I too
        low, high = 0, 65535
    elif low >= 0 and high <= 65535:
        low, high = 0, next(white for white in (1, 255, 65535) if high <= white and (white > 1 or image.mode == "F"))
    scaled = (values - low) * (255 / max(high - low, 1e-30))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
