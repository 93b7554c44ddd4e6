"""TinyWorld test scenes to choose from. What they show is known, so their objects can be checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from mmfix_app.pictures import data_uri
from mmfix_evals.tinyworld.draw import render
from mmfix_evals.tinyworld.text import QUESTION, with_article
from mmfix_evals.tinyworld.world import CATEGORIES, absent_partners, file_name, scene

INDICES = tuple(range(12))
"""The first scenes of the test split, as they come: none was chosen."""
SPLIT = "test"
START = 3
"""The picture that stands there at first: one in which the plain model names what is not there."""


@dataclass(frozen=True)
class Shown:
    """One picture of the gallery.

    Args:
        name: file name.
        place: kind of scene.
        contents: categories in the picture.
        expected: categories that usually come with those, and are not there.
        image: the picture.
    """

    name: str
    place: str
    contents: tuple[str, ...]
    expected: tuple[str, ...]
    image: Image.Image

    @property
    def alt(self) -> str:
        return f"Drawing of {with_article(self.place)} with {listed(self.contents)}"


@lru_cache(maxsize=1)
def pictures() -> tuple[Shown, ...]:
    """The gallery."""
    found = []
    for index in INDICES:
        one = scene(SPLIT, index)
        contents = tuple(sorted(one.categories, key=CATEGORIES.index))
        expected = tuple(sorted(absent_partners(one), key=CATEGORIES.index))
        found.append(Shown(file_name(SPLIT, index), one.scene, contents, expected, render(one)))
    return tuple(found)


def known(image: Image.Image) -> Shown | None:
    """The gallery's picture with exactly these pixels: only then its contents are known."""
    return _by_pixels().get(_digest(image))


@lru_cache(maxsize=1)
def _by_pixels() -> dict[str, Shown]:
    return {_digest(one.image): one for one in pictures()}


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(b"%d x %d;" % image.size + image.convert("RGB").tobytes()).hexdigest()


def write(folder: Path) -> list[Path]:
    """The gallery's pictures as PNG files, to be served."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for one in pictures():
        path = folder / one.name
        if not path.exists():
            one.image.save(path)
        paths.append(path)
    return paths


def renewed(folder: Path, index: int) -> Path:
    """One of the gallery's files, young again: gradio removes what a visitor chose like an upload, after its time."""
    path = write(folder)[index % len(pictures())]
    path.touch()
    return path


def strip() -> str:
    """The gallery as buttons in a row."""
    buttons = [
        f'<button type="button" class="thumb" data-index="{n}" data-name="{one.name}" title="{one.alt}">'
        f'<img src="{data_uri(one.image)}" alt="{one.alt}" width="72" height="72"></button>'
        for n, one in enumerate(pictures())
    ]
    return f'<div class="thumbs" role="group" aria-label="Pictures to choose from">{"".join(buttons)}</div>'


def questions(image: Image.Image | None) -> list[tuple[str, str]]:
    """Objects to ask about: (label, object); what is known of the picture stands first and is said."""
    shown = known(image) if image is not None else None
    if shown is None:
        return [(name, name) for name in CATEGORIES]
    first = [(f"{name} (expected, absent)", name) for name in shown.expected]
    first += [(f"{name} (present)", name) for name in shown.contents]
    taken = {name for _, name in first}
    return first + [(f"{name} (absent)", name) for name in CATEGORIES if name not in taken]


def question(name: str) -> str:
    return QUESTION.format(with_article(name))


def listed(names: tuple[str, ...] | list[str]) -> str:
    """``a dog, a kite and a fork``."""
    words = [with_article(name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"
