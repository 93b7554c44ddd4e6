"""What visitors may send: caps before decoding, three formats, allow-lists, escaped text."""

from __future__ import annotations

import base64
import io
import struct
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.paced import pace

from mmfix.errors import ImageError, MethodError, MmfixError, UsageError
from mmfix_app import gallery, stage
from mmfix_app.limits import Limits
from mmfix_app.markup import esc
from mmfix_app.pictures import open_base64, open_bytes, open_upload
from mmfix_app.service import Decoding, Run, Service, Token

LIMITS = Limits()
ASKED = "Please describe this image in detail."
"""What the bundled model was trained on: other wordings may be answered with one word, and nothing is left to stop."""


def encoded(kind: str, size: tuple[int, int] = (20, 10), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises width × height pixels, in a few bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_three_formats_are_taken_by_content(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(kind))
    assert open_upload(path, LIMITS).size == (20, 10)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match="not a PNG, JPEG or WebP"):
        open_bytes(encoded(kind), LIMITS)


@pytest.mark.parametrize("data", [b"", b"<svg onload='x'>", b"%PDF-1.4", b"RIFF\0\0\0\0WAVE"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="not a PNG"):
        open_bytes(data, LIMITS)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    start = time.perf_counter()
    with pytest.raises(ImageError, match="50000 × 50000 pixels"):
        open_bytes(bomb(50_000, 50_000), LIMITS)
    assert time.perf_counter() - start < 1


def test_the_pixel_cap_is_forty_million() -> None:
    with pytest.raises(ImageError, match="limit of 40,000,000"):
        open_bytes(bomb(8001, 5000), LIMITS)
    with pytest.raises(ImageError, match="broken or cut short"):  # within the cap: decoded, and found wanting
        open_bytes(bomb(2000, 2000), LIMITS)


def test_too_many_bytes_are_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(LIMITS.upload_bytes + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    with pytest.raises(ImageError, match="more than the limit of 10 MB"):
        open_upload(path, LIMITS)


def test_base64_has_the_same_caps() -> None:
    data = encoded("PNG")
    assert open_base64(base64.b64encode(data).decode(), LIMITS).size == (20, 10)
    assert open_base64("data:image/png;base64," + base64.b64encode(data).decode(), LIMITS).size == (20, 10)
    with pytest.raises(ImageError, match="base64"):
        open_base64("http://example.org/a.png", LIMITS)
    with pytest.raises(ImageError, match="more than the limit"):
        open_base64("A" * 100, replace(LIMITS, upload_bytes=-200))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_bytes(encoded("JPEG", exif=exif), LIMITS).size == (10, 20)


def test_what_a_model_writes_is_escaped() -> None:
    evil = "<img src=x onerror=alert(1)> ${props.value} {{value}} `\\"
    assert not set("<>${}`\\\"'") & set(esc(evil + "\"'").replace("&#123;", "").replace("&#125;", ""))
    image = gallery.pictures()[0].image
    token = Token(evil, {"image": 0.5, "sink": 0.0, "text": 0.5}, 0.5, np.ones((2, 2)), -1.0)
    request = type("R", (), {"image": image, "contents": None})()
    request.method = __import__("mmfix").method("vhr")
    page = stage.render(Run(request, (token,), (token,), "done", {"fired": {"vhr": {"fired": 1}}}))
    assert "onerror=alert" not in page.replace("onerror=alert(1)&gt;", "")
    assert "<img src=x" not in page
    assert "${" not in page
    assert "{{" not in page


@pytest.mark.parametrize(
    ("decoding", "word"),
    [
        (Decoding(max_new_tokens=129), "max new tokens"), (Decoding(max_new_tokens=0), "max new tokens"),
        (Decoding(max_new_tokens=1.5), "whole number"), (Decoding(temperature=float("nan")), "temperature"),
        (Decoding(temperature=0.0), "temperature"), (Decoding(top_p=1.1), "top p"), (Decoding(seed=-1), "seed"),
        (Decoding(seed="1"), "seed"), (Decoding(max_new_tokens=True), "max new tokens"),
    ],
)  # fmt: skip
def test_decoding_outside_its_caps_is_refused(decoding: Decoding, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        decoding.checked(LIMITS)


def test_prompts_and_methods_are_checked(service: Service) -> None:
    image = gallery.pictures()[0].image
    for prompt in ("", "  ", "x" * 501, "what is <image> ?"):
        with pytest.raises(UsageError, match="prompt"):
            service.request(image, prompt, "vhr", {}, Decoding())
    with pytest.raises(MethodError, match=r"'os\.system' is not one of"):
        service.request(image, "hi", "os.system", {}, Decoding())
    with pytest.raises(MethodError, match="no parameter 'alhpa'"):
        service.request(image, "hi", "vhr", {"alhpa": 1}, Decoding())


def test_a_run_stops_when_it_is_cancelled_and_frees_the_model(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace(monkeypatch, pause=0.02, halt=12)
    request = service.request(gallery.pictures()[0].image, ASKED, "vhr", {}, Decoding(128))
    cancelled = threading.Event()
    found: list[Run] = []
    for run in service.run(request, cancelled):
        found.append(run)
        cancelled.set()
    assert found[-1].state == "stopped"
    assert len(found[-1].plain) < 128
    with service.decoder.exclusive():
        assert not any("_mmfix" in module.__dict__ for module in service.model.modules())


def test_a_run_stops_at_the_time_limit(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    pace(monkeypatch, halt=4)
    short = Service(service.decoder, replace(LIMITS, seconds=0.0))
    request = short.request(gallery.pictures()[0].image, ASKED, "vhr", {}, Decoding(128))
    assert list(short.run(request))[-1].state == "timeout"


def test_leaving_a_run_frees_the_model(service: Service) -> None:
    request = service.request(gallery.pictures()[0].image, ASKED, "vhr", {}, Decoding(128))
    run = service.run(request)
    next(run)
    run.close()
    assert not any("_mmfix" in module.__dict__ for module in service.model.modules())
    assert not [t for t in threading.enumerate() if t.name in ("mmfix-stream", "mmfix-app-deadline")]


def test_errors_are_of_one_family() -> None:
    assert issubclass(ImageError, MmfixError)
