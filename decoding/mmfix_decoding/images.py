"""Pictures in, RGB out: one door through which every image of this package comes."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from mmfix.errors import ImageError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image"

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 40_000_000
MAX_ASPECT = 200
"""Longest side over shortest side. Processors resize the *shortest* side up to a few hundred pixels, so that a strip of
one pixel by a million would become terabytes."""

_ALLOWED = "PNG, JPEG, WebP, BMP, GIF or TIFF"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//|[a-z]+/[a-z0-9.+-]+[;,])")
# What people try to open as a picture and this package does not decode: (offset, signature, name).
_SIGNATURES = (
    (0, b"%PDF", "a PDF document"),
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftyphei", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIF picture"),
    (4, b"ftyp", "a video"),
    (4, b"jP  ", "a JPEG 2000 picture"),
    (0, b"\x00\x00\x01\x00", "an icon file"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
)


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load one picture as 8-bit RGB, upright.

    The EXIF orientation is applied; of an animation or a multi-page file the first frame is taken; transparent
    pixels are laid on white; 16-bit grey is scaled to 8 bits, not clipped.

    Args:
        source: path of a PNG, JPEG, WebP, BMP, GIF or TIFF file, the bytes of one, or a PIL image of any mode
            (left as it is: the answer is a new image).
        max_pixels: limit on width × height, checked on the header before a pixel is decoded.

    Returns:
        A new PIL image of mode ``RGB``.

    Raises:
        ImageError: the file is missing, a folder, empty, broken, cut short, not a picture, of another format, has no
            pixels, more than `max_pixels` of them or sides in a ratio above 200; or `source` is a URL or no image.
    """
    if isinstance(source, Image.Image):
        return _finish(source, "the PIL image", max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(io.BytesIO(source), f"the image given as {len(source)} bytes", max_pixels)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"no image can be read from an object of type {type(source).__name__}; give a path, bytes or a PIL image"
        )
    name = os.fspath(source)
    if isinstance(name, str) and _URL.match(name):
        raise ImageError(
            f"{_short(name)} is a URL; mmfix opens no connections: download the file first, then give its path"
        )
    where = _short(os.fsdecode(name))
    path = Path(os.fsdecode(name)).expanduser()
    try:
        if not name or not path.exists():
            raise ImageError(f"image {where} does not exist; check the path")
        if path.is_dir():
            raise ImageError(f"image {where} is a folder; give the path of one picture in it")
        if not path.is_file():
            raise ImageError(f"image {where} is not a regular file; save the picture to a file first")
        with path.open("rb") as stream:
            return _read(stream, f"image {where}", max_pixels)
    except (OSError, ValueError) as error:  # no permission, a name that is too long or holds a null byte
        raise ImageError(f"cannot open image {where}: {_reason(error)}; check the path and its permissions") from error


def _short(name: str) -> str:
    """`name` in quotes on one line, its middle left out when it is long: it may be anything, a whole file included."""
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if text == "not identified by this driver":
        text = "its header is not valid"
    return " ".join(str(text).split())[:200]


def _read(stream: BinaryIO, where: str, max_pixels: int) -> Image.Image:
    """Decode an open file; `where` names it in messages."""
    head = stream.read(512)
    if not head:
        raise ImageError(f"{where} is empty (0 bytes); save or download it again")
    stream.seek(0)
    Image.init()
    for name in FORMATS:
        # The plugins are called here, not through Image.open: that one refuses a large header before telling its
        # size, by a warning or an error of its own with a limit that is global to the process.
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or (accept is not None and accept(head[:16]) is not True):
            continue
        try:
            image = factory(stream, "")
        except Exception as error:  # the plugins raise whatever their parsing trips on
            raise ImageError(
                f"{where} is a broken {name} file ({_reason(error)}); save or download it again"
            ) from error
        return _finish(image, where, max_pixels)
    raise ImageError(f"{where} is {_guess(head)}; give a {_ALLOWED} file")


def _guess(head: bytes) -> str:
    """What a file that is no allowed picture seems to be, from its first bytes."""
    for offset, signature, name in _SIGNATURES:
        if head[offset:].startswith(signature):
            return f"{name}, which is not supported"
    if b"<svg" in head:
        return "an SVG drawing, which is not supported"
    text = head.decode("utf-8", errors="ignore")  # the cut at 512 bytes may split a character
    if len(text.encode()) >= len(head) - 3 and all(c.isprintable() or c.isspace() for c in text):
        return "text, not an image"
    return "not an image, or of a format that is not supported"


def _finish(image: Image.Image, where: str, max_pixels: int) -> Image.Image:
    """Check the size, then decode, turn upright and convert."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{where} has no pixels ({width} × {height}); give a picture of at least 1 × 1")
    if width * height > max_pixels:
        raise ImageError(
            f"{where} has {width} × {height} pixels, more than the limit of {max_pixels:,}; scale it down first"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{where} has {width} × {height} pixels, sides in a ratio above {MAX_ASPECT}:1; crop or pad it first"
        )
    try:
        image.load()
    except Exception as error:
        raise ImageError(f"{where} is broken or cut short ({_reason(error)}); save or download it again") from error
    try:
        return _to_rgb(_upright(image))
    except Exception as error:
        raise ImageError(
            f"{where} of mode {image.mode} cannot be turned into RGB ({_reason(error)}); save it as 8-bit RGB first"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the orientation; the pixels are fine
        return image.copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":
        return Image.fromarray(_to_bytes(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # Pixels under full transparency hold arbitrary colours (often black): they must not show.
        if image.mode == "La":
            image = image.convert("LA")
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values [height, width] of 16 or 32 bits or floats, scaled to uint8."""
    levels = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(levels.min()), float(levels.max())
    if mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0 and mode == "F" and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    return np.rint((levels - low) * (255.0 / max(high - low, 1e-9))).astype(np.uint8)
