"""The renderer: a scene description becomes a 96 x 96 picture, the same bytes for the same scene.

Pictures are drawn at three times the size and box-filtered, then brightness, contrast and pixel noise are varied.
Far objects are drawn first, so near ones hide parts of them.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw

from mmfix_evals.tinyworld.shapes import PAINT, RGB, SHAPES, VIVID
from mmfix_evals.tinyworld.world import SIZE, PlacedObject, Scene, stream

ZOOM = 3
NOISE = 6.0
"""Standard deviation of the pixel noise in grey levels."""


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: 96 x 96 RGB, deterministic."""
    rng = stream("draw", scene.seed)
    canvas = Image.new("RGB", (SIZE * ZOOM, SIZE * ZOOM))
    pen = ImageDraw.Draw(canvas)
    _background(pen, scene.scene, rng)
    colours = [rng.choice(PAINT.get(item.category, VIVID)) for item in scene.objects]
    for near in (False, True):
        for item, colour in zip(scene.objects, colours, strict=True):
            if item.near == near:
                _object(pen, item, _vary(colour, rng, 14))
    pixels = np.asarray(canvas.reduce(ZOOM), dtype=np.float32)
    pixels = (pixels - 128) * rng.uniform(0.8, 1.15) + 128 + rng.uniform(-18, 18)
    noise = np.random.default_rng(scene.seed).normal(0.0, NOISE, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _object(pen: ImageDraw.ImageDraw, item: PlacedObject, colour: RGB) -> None:
    x, y, w, h = (side * ZOOM for side in item.box)
    shades = {"main": colour, "dark": _mix(colour, (0, 0, 0), 0.4), "light": _mix(colour, (255, 255, 255), 0.5)}
    width = max(2, round(min(w, h) * 0.09))
    for kind, points, paint in SHAPES[item.category]:
        fill = shades[paint] if isinstance(paint, str) else paint
        xy = [x + value * w if i % 2 == 0 else y + value * h for i, value in enumerate(points)]
        if kind == "E":
            pen.ellipse(xy, fill=fill)
        elif kind == "R":
            pen.rectangle(xy, fill=fill)
        elif kind == "P":
            pen.polygon(xy, fill=fill)
        elif kind == "O":
            pen.ellipse(xy, outline=fill, width=width)
        elif kind == "L":
            pen.line(xy, fill=fill, width=width, joint="curve")
        else:
            pen.pieslice(xy, *((180, 360) if kind == "U" else (0, 180)), fill=fill)


def _background(pen: ImageDraw.ImageDraw, place: str, rng: random.Random) -> None:
    upper, lower = _BACKDROPS[place]
    full = SIZE * ZOOM
    horizon = round(full * rng.uniform(0.42, 0.56))
    pen.rectangle((0, 0, full, horizon), fill=_vary(upper, rng, 12))
    pen.rectangle((0, horizon, full, full), fill=_vary(lower, rng, 12))
    _DETAILS[place](pen, full, horizon, rng)


def _kitchen(pen: ImageDraw.ImageDraw, full: int, horizon: int, rng: random.Random) -> None:
    step = rng.randint(24, 34)
    for at in range(rng.randint(0, step), full, step):
        pen.line((at, 0, at, horizon), fill=(215, 212, 200), width=2)
        if at < horizon:
            pen.line((0, at, full, at), fill=(215, 212, 200), width=2)
    pen.rectangle((0, horizon, full, horizon + 9), fill=(120, 92, 70))


def _bedroom(pen: ImageDraw.ImageDraw, full: int, horizon: int, rng: random.Random) -> None:
    left = rng.randint(10, full - 90)
    pen.rectangle((left, 15, left + 72, horizon - 35), fill=(245, 245, 250))
    pen.rectangle((left + 6, 21, left + 66, horizon - 41), fill=(175, 200, 235))
    pen.line((left + 36, 15, left + 36, horizon - 35), fill=(245, 245, 250), width=5)
    for at in range(horizon, full, 28):
        pen.line((0, at, full, at), fill=(150, 112, 82), width=2)


def _office(pen: ImageDraw.ImageDraw, full: int, horizon: int, rng: random.Random) -> None:
    for at in range(rng.randint(8, 14), horizon - 24, 13):
        pen.line((20, at, full - 20, at), fill=(160, 172, 182), width=4)
    pen.rectangle((0, horizon - 10, full, horizon), fill=(140, 146, 155))


def _street(pen: ImageDraw.ImageDraw, full: int, horizon: int, rng: random.Random) -> None:
    at = 0
    while at < full:
        wide, top = rng.randint(42, 80), rng.randint(10, horizon - 60)
        pen.rectangle((at, top, at + wide, horizon), fill=_vary((150, 130, 122), rng, 22))
        for x in range(at + 8, at + wide - 12, 20):
            for y in range(top + 10, horizon - 14, 24):
                pen.rectangle((x, y, x + 9, y + 12), fill=(205, 205, 180))
        at += wide + rng.randint(0, 14)
    middle = (horizon + full) // 2
    for x in range(rng.randint(-40, 0), full, 62):
        pen.rectangle((x, middle, x + 34, middle + 6), fill=(225, 225, 215))


def _park(pen: ImageDraw.ImageDraw, full: int, horizon: int, rng: random.Random) -> None:
    for _ in range(3):
        x = rng.randint(0, full)
        pen.rectangle((x - 6, horizon - 60, x + 6, horizon + 6), fill=(110, 78, 50))
        pen.ellipse((x - 36, horizon - 120, x + 36, horizon - 36), fill=_vary((62, 122, 62), rng, 14))


def _beach(pen: ImageDraw.ImageDraw, full: int, horizon: int, rng: random.Random) -> None:
    pen.rectangle((0, horizon - 48, full, horizon), fill=_vary((50, 130, 180), rng, 10))
    for _ in range(5):
        x, y = rng.randint(0, full), rng.randint(horizon - 42, horizon - 6)
        pen.line((x, y, x + 30, y), fill=(200, 225, 235), width=3)
    x = rng.randint(20, full - 50)
    pen.ellipse((x, 8, x + 32, 40), fill=(255, 238, 150))


_BACKDROPS: dict[str, tuple[RGB, RGB]] = {
    "kitchen": ((236, 232, 214), (196, 168, 134)),
    "bedroom": ((206, 190, 214), (176, 138, 104)),
    "office": ((184, 196, 206), (112, 118, 128)),
    "street": ((178, 192, 206), (98, 98, 102)),
    "park": ((158, 204, 240), (116, 178, 92)),
    "beach": ((150, 208, 244), (232, 214, 160)),
}
_DETAILS = {
    "kitchen": _kitchen,
    "bedroom": _bedroom,
    "office": _office,
    "street": _street,
    "park": _park,
    "beach": _beach,
}


def _vary(colour: RGB, rng: random.Random, spread: int) -> RGB:
    r, g, b = (min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)
    return r, g, b


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    r, g, b_ = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return r, g, b_


def contact_sheet(scenes: list[Scene], columns: int = 8, zoom: int = 2) -> Image.Image:
    """Many pictures on one sheet, each with its scene and objects written below."""
    side, text = SIZE * zoom, 42
    rows = -(-len(scenes) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, item in enumerate(scenes):
        x, y = (i % columns) * (side + 8), (i // columns) * (side + text)
        sheet.paste(render(item).resize((side, side), Image.Resampling.NEAREST), (x, y))
        words = [o.category + ("" if o.near else " (far)") for o in item.objects]
        lines = [f"{item.scene} {item.image_id}", ", ".join(words[:3]), ", ".join(words[3:])]
        for row, line in enumerate(lines):
            pen.text((x, y + side + 1 + 13 * row), line, fill="black")
    return sheet
