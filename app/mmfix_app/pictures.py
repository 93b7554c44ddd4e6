"""Pictures from visitors: checked before they are decoded, and only of three formats."""

from __future__ import annotations

import base64
import binascii
import io
import os
from pathlib import Path

from PIL import Image

from mmfix.errors import ImageError
from mmfix_app.limits import FORMATS, Limits
from mmfix_decoding import load_image

_SIGNATURES = {
    "PNG": lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"),
    "JPEG": lambda head: head.startswith(b"\xff\xd8\xff"),
    "WEBP": lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP",
}


def open_upload(path: str | os.PathLike[str] | None, limits: Limits) -> Image.Image:
    """The picture of an uploaded file: RGB, upright.

    Raises:
        ImageError: no file, too many bytes, another format, too many pixels, broken.
    """
    if path is None:
        raise ImageError("no picture: choose one below, upload one, or paste one")
    try:
        size = os.stat(path).st_size
        if size > limits.upload_bytes:
            raise ImageError(_too_large(size, limits))
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"the picture cannot be read ({error.strerror}); upload it again") from error
    return open_bytes(data, limits)


def open_base64(text: str, limits: Limits) -> Image.Image:
    """The picture of a base64 string, with or without a ``data:`` prefix."""
    if len(text) > limits.upload_bytes * 4 // 3 + 200:
        raise ImageError(_too_large(len(text) * 3 // 4, limits))
    body = text.partition(",")[2] if text.startswith("data:") else text
    try:
        data = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("the picture is not valid base64; send the bytes of a PNG, JPEG or WebP file") from error
    return open_bytes(data, limits)


def open_bytes(data: bytes, limits: Limits) -> Image.Image:
    """The picture of a file's bytes; size and format are checked on the first bytes and the header."""
    if len(data) > limits.upload_bytes:
        raise ImageError(_too_large(len(data), limits))
    if not any(known(data[:16]) for known in _SIGNATURES.values()):
        raise ImageError(f"this file is not a {', '.join(FORMATS[:-1])} or WebP picture; convert it first")
    try:
        return load_image(data, max_pixels=limits.pixels)
    except ImageError as error:
        raise ImageError(str(error).replace(f"the image given as {len(data)} bytes", "the picture")) from error


def data_uri(image: Image.Image, longest: int = 640) -> str:
    """A PNG (small pictures) or JPEG of at most `longest` pixels a side, to be put into a page."""
    shown = image
    if max(image.size) > longest:
        scale = longest / max(image.size)
        shown = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    kind = "PNG" if max(shown.size) <= 256 else "JPEG"
    buffer = io.BytesIO()
    shown.save(buffer, kind, **({} if kind == "PNG" else {"quality": 88}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _too_large(size: int, limits: Limits) -> str:
    have, most = size / 1024**2, limits.upload_bytes / 1024**2
    return f"the picture has {have:.1f} MB, more than the limit of {most:.0f} MB; save it smaller"
