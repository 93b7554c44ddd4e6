"""load_image: every mode, every format, every broken thing."""

from __future__ import annotations

import io
import os
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmfix.errors import ImageError
from mmfix_decoding import load_image


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def scene() -> Image.Image:
    """40 × 30: four flat quarters in four colours, so that a turn and a lossy format both show."""
    image = Image.new("RGB", (40, 30), "red")
    image.paste("lime", (20, 0, 40, 15))
    image.paste("blue", (0, 15, 20, 30))
    image.paste("yellow", (20, 15, 40, 30))
    return image


def corners(image: Image.Image) -> list[str]:
    """Names of the colours of the four quarters, row by row."""
    names = {(1, 0, 0): "red", (0, 1, 0): "lime", (0, 0, 1): "blue", (1, 1, 0): "yellow"}
    w, h = image.size
    spots = [(w // 4, h // 4), (3 * w // 4, h // 4), (w // 4, 3 * h // 4), (3 * w // 4, 3 * h // 4)]
    return [names[tuple(int(v > 127) for v in image.getpixel(spot))] for spot in spots]


UPRIGHT = ["red", "lime", "blue", "yellow"]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats(form: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.bin"  # the contents decide, not the name
    path.write_bytes(encoded(scene(), form))
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        image = load_image(source)
        assert (image.mode, image.size) == ("RGB", (40, 30))
        assert corners(image) == UPRIGHT


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), "black")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(Image.new("RGB", (8, 8), "white"), form, save_all=True, append_images=frames)
        assert load_image(data).getpixel((4, 4)) == (255, 255, 255), form


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned left, to be shown turned right again
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = scene().transpose(turn[orientation]) if orientation in turn else scene()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", exif=exif)
    for source in (data, Image.open(io.BytesIO(data))):
        image = load_image(source)
        assert image.size == (40, 30)
        assert corners(image) == UPRIGHT


def test_broken_exif_keeps_the_picture() -> None:
    assert corners(load_image(encoded(scene(), "JPEG", exif=b"Exif\x00\x00garbage"))) == UPRIGHT


def test_transparent_pixels_become_white() -> None:
    hidden = np.zeros((4, 4, 4), np.uint8)  # black under full transparency
    hidden[0, 0] = (255, 0, 0, 255)
    rgba = Image.fromarray(hidden)
    grey = Image.fromarray(np.stack([np.zeros((4, 4)), np.zeros((4, 4))], -1).astype(np.uint8), "LA")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 1)
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    sources: list[bytes | Image.Image] = [
        rgba,
        rgba.convert("RGBa"),
        encoded(rgba, "PNG"),
        encoded(rgba, "WEBP", lossless=True, exact=True),
        grey,
        encoded(grey, "PNG"),
        encoded(palette, "PNG", transparency=0),
        encoded(palette, "GIF", transparency=0),
        encoded(palette, "PNG", transparency=bytes([0, 255])),
        encoded(keyed, "PNG", transparency=(1, 2, 3)),
        encoded(Image.new("L", (4, 4), 7), "PNG", transparency=7),
    ]
    for n, source in enumerate(sources):
        assert load_image(source).getpixel((3, 3)) == (255, 255, 255), n
    assert load_image(rgba).getpixel((0, 0)) == (255, 0, 0)


def test_half_transparent_is_mixed() -> None:
    image = load_image(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))
    assert image.getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(
    ("image", "grey"),
    [
        (Image.new("1", (3, 3), 1), 255),
        (Image.new("L", (3, 3), 100), 100),
        (Image.new("P", (3, 3), 0), 0),
        (Image.new("CMYK", (3, 3), (0, 0, 0, 255)), 0),
        (Image.new("YCbCr", (3, 3), (90, 128, 128)), 90),
        (Image.new("HSV", (3, 3), (0, 0, 80)), 80),
        (Image.fromarray(np.full((3, 3), 32896, np.uint16)), 128),
        (Image.fromarray(np.full((3, 3), 32896, np.int32)), 128),
        (Image.fromarray(np.full((3, 3), 77, np.int32)), 77),
        (Image.fromarray(np.full((3, 3), 0.5, np.float32)), 128),
        (Image.fromarray(np.full((3, 3), 200, np.float32)), 200),
        (Image.fromarray(np.array([[np.nan, 1.0]], np.float32)), 0),
        (Image.fromarray(np.full((3, 3), -5.0, np.float32)), 0),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_modes(image: Image.Image, grey: int) -> None:
    got = load_image(image)
    assert got.mode == "RGB"
    assert got.getpixel((0, 0)) == pytest.approx((grey,) * 3, abs=1)


def test_16_bit_files_are_scaled_not_clipped() -> None:
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    for form in ("PNG", "TIFF"):
        values = np.asarray(load_image(encoded(ramp, form)))[..., 0].ravel()
        assert np.abs(values.astype(int) - np.arange(256)).max() <= 1


def test_the_source_is_left_as_it_is() -> None:
    image = scene().convert("RGBA")
    load_image(image).putpixel((0, 0), (9, 9, 9))
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (255, 0, 0, 255)
    rgb = scene()
    load_image(rgb).putpixel((0, 0), (9, 9, 9))
    assert rgb.getpixel((0, 0)) == (255, 0, 0)


def png_header(width: int, height: int) -> bytes:
    """A PNG that only claims its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + pixels + chunk(b"IEND", b"")


def bad_files(folder: Path) -> dict[str, tuple[object, str]]:
    """Name → (source, words of the message)."""
    good = encoded(scene(), "PNG")
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    files: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "empty"),
        "text.png": (b"this is no picture, it is a letter\n", "text"),
        "utf8.jpg": ("ein Gruß — 你好\n".encode() * 100, "text"),
        "page.html": (b"<!doctype html><html><body>404</body></html>", "text"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        "paper.pdf": (b"%PDF-1.7\n\x00\x01", "PDF"),
        "phone.heic": (b"\x00\x00\x00\x18ftypheic\x00\x00", "HEIC"),
        "film.mp4": (b"\x00\x00\x00\x18ftypisom\x00\x00", "video"),
        "noise.bin": (bytes(range(128, 256)) * 8, "not an image"),
        "cut.png": (good[: len(good) // 2], "broken"),
        "cut.jpg": (noise[: len(noise) // 2], "broken"),
        "header.png": (good[:12], "broken"),
        "flipped.png": (good[:45] + bytes([good[45] ^ 255]) + good[46:], "broken"),
        "huge.png": (png_header(100_000, 100_000), "100000 × 100000 pixels, more than the limit"),
        "large.png": (png_header(10_000, 10_000), "10000 × 10000 pixels, more than the limit"),
        "strip.png": (png_header(1, 1_000_000), "ratio"),
        "none.png": (png_header(0, 10), ""),
        "ppm": (b"P6 2 2 255 " + b"\x80\x90\xff" * 4, "not an image"),
        "favicon.ico": (b"\x00\x00\x01\x00\x01\x00\x10\x10\x00\x00", "icon"),
    }
    made: dict[str, tuple[object, str]] = {}
    for name, (data, words) in files.items():
        (folder / name).write_bytes(data)
        made[name] = (folder / name, words)
        made[f"{name} as bytes"] = (data, words)
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    return made | {
        "missing": (folder / "nothing.png", "does not exist"),
        "empty name": ("", "'' does not exist"),
        "folder": (folder, "is a folder"),
        "fifo": (fifo, "not a regular file"),
        "null byte": ("a\0b.png", ""),
        "long name": ("x" * 5000, ""),
        "file contents as a path": (good.decode("latin1"), ""),
        "web": ("https://example.org/cat.png", "download"),
        "bucket": ("s3://bucket/cat.png", "download"),
        "data": ("data:image/png;base64,AAAA", "download"),
        "number": (5, "int"),
        "array": (np.zeros((3, 3, 3)), "ndarray"),
        "nothing": (None, "NoneType"),
        "no pixels": (Image.new("RGB", (0, 5)), "no pixels"),
        "too large": (Image.new("1", (7000, 6000)), "more than the limit"),
    }


def test_bad_images_say_what_where_and_what_to_do(tmp_path: Path) -> None:
    for name, (source, words) in bad_files(tmp_path).items():
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImageError) as caught:
                load_image(source)  # type: ignore[arg-type]
        message = str(caught.value)
        assert words in message, (name, message)
        assert "\n" not in message, name
        assert len(message) < 500, name
        assert ";" in message, (name, message)  # what is wrong; what to do
        if isinstance(source, Path):
            assert source.name in message, (name, message)
        assert time.perf_counter() - start < 10, name  # nothing large was decoded


def test_no_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(scene(), "PNG"))
    path.chmod(0)
    with pytest.raises(ImageError, match=r"Permission denied; check"):
        load_image(path)


def test_the_limit_is_ours_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(encoded(scene(), "PNG")).size == (40, 30)
    with pytest.raises(ImageError, match=r"40 × 30 pixels, more than the limit of 1,199"):
        load_image(encoded(scene(), "PNG"), max_pixels=1199)
    assert load_image(encoded(scene(), "PNG"), max_pixels=1200).size == (40, 30)


GOOD = {form: encoded(scene(), form) for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_damaged_files_never_surprise(form: str, data: st.DataObject) -> None:
    content = bytearray(GOOD[form])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = load_image(bytes(content))
        except ImageError:
            return
        assert image.mode == "RGB"
