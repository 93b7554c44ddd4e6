"""Building POPE questions from lists of objects per image, draw for draw as the official builder does.

For each image, alternately: the next of its first objects (label yes) and an object it does not have (label no), chosen
at random (`random`), as the most frequent one (`popular`), or as the one that most often occurs together with the
object just asked for (`adversarial`). Paper: Li et al. 2023, arXiv:2305.10355; code: AoiDragon/POPE.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmfix_evals import files
from mmfix_evals.errors import DataError, UsageError

SPLITS = ("random", "popular", "adversarial")
TEMPLATE = "Is there a {} in the image?"
VOWELS = "aeiou"


@dataclass(frozen=True)
class Scene:
    """An image and its objects: ordered, each once."""

    image: str
    objects: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """The questions of every split, and what they were made from.

    Attributes:
        selected: the images asked about, in file order.
        counts: object → number of selected images, in order of first appearance.
        co_occurrence: object → its partners in the same image, most frequent first.
        splits: split → records `question_id` (from 1), `image`, `text`, `label`.
    """

    selected: tuple[Scene, ...]
    counts: Mapping[str, int]
    co_occurrence: Mapping[str, tuple[str, ...]]
    splits: Mapping[str, list[dict[str, Any]]]


def build(
    scenes: Iterable[Scene],
    images: int = 500,
    pairs: int = 3,
    seed: int = 0,
    splits: Sequence[str] = SPLITS,
    template: str = TEMPLATE,
    compat_imange: bool = False,
) -> Questions:
    """Draw images and build the questions, all from one stream of random numbers: sample, then split by split.

    Args:
        scenes: candidates; those with fewer than `pairs` objects are left out.
        images: how many to draw.
        pairs: positive (and negative) questions per image.
        seed: of the stream; the global random state is neither used nor changed.
        splits: which ones and in which order, out of `SPLITS`.
        template: with one "{}" for the object, preceded by "a".
        compat_imange: the official text byte for byte, in which "a" before a vowel turns "image" into "imange".

    Raises:
        UsageError: unknown split, or numbers below 1.
        DataError: too few images, or an image for which no object is left to ask about.
    """
    rng = random.Random(seed)
    selected = sample_scenes(scenes, images, pairs, rng)
    return questions_about(selected, pairs, rng, splits, template, compat_imange)


def sample_scenes(scenes: Iterable[Scene], images: int, pairs: int, rng: random.Random) -> list[Scene]:
    """`images` scenes out of those with at least `pairs` objects, in drawn order."""
    if images < 1 or pairs < 1:
        raise UsageError(f"images and pairs must be at least 1, got {images} and {pairs}")
    kept = [scene for scene in scenes if len(scene.objects) >= pairs]
    if len(kept) < images:
        raise DataError(f"only {len(kept)} images have at least {pairs} objects; ask for at most that many images")
    return rng.sample(kept, images)


def questions_about(
    selected: Sequence[Scene],
    pairs: int,
    rng: random.Random,
    splits: Sequence[str] = SPLITS,
    template: str = TEMPLATE,
    compat_imange: bool = False,
) -> Questions:
    """The questions about images already chosen; arguments and errors as in `build`."""
    for split in splits:
        if split not in SPLITS:
            raise UsageError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if template.count("{}") != 1:
        raise UsageError(f"the template {template!r} must hold exactly one {{}} for the object")
    counts = Counter(name for scene in selected for name in scene.objects)
    partners = co_occurrence(selected)
    ask = _Asker(counts, partners, rng)
    built = {}
    for split in splits:
        asked = [(scene.image, *pair) for scene in selected for pair in ask.pairs(scene, split, pairs)]
        built[split] = [
            {
                "question_id": number,
                "image": image,
                "text": question(name, template, compat_imange),
                "label": label,
            }
            for number, (image, name, label) in enumerate(asked, 1)
        ]
    return Questions(tuple(selected), dict(counts), partners, built)


def co_occurrence(scenes: Iterable[Scene]) -> dict[str, tuple[str, ...]]:
    """Every object's partners within the same image, most frequent first, ties in order of first appearance."""
    together: dict[str, Counter[str]] = {}
    for scene in scenes:
        for name in scene.objects:
            together.setdefault(name, Counter()).update(other for other in scene.objects if other != name)
    return {name: _by_count(partners) for name, partners in together.items()}


def _by_count(counts: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(counts, key=lambda name: -counts[name]))


class _Asker:
    """Chooses what is asked about one image."""

    def __init__(self, counts: Mapping[str, int], partners: Mapping[str, Sequence[str]], rng: random.Random) -> None:
        self.names = list(counts)
        self.by_count = _by_count(counts)
        self.partners = partners
        self.rng = rng

    def pairs(self, scene: Scene, split: str, pairs: int) -> Iterator[tuple[str, str]]:
        """(object, label), alternating yes and no; nothing is asked twice."""
        used = set(scene.objects)
        for name in scene.objects[:pairs]:
            yield name, "yes"
            absent = self._absent(scene, split, name, lambda other: other not in used)
            used.add(absent)
            yield absent, "no"

    def _absent(self, scene: Scene, split: str, present: str, free: Callable[[str], bool]) -> str:
        ranked = {"random": (), "popular": self.by_count, "adversarial": self.partners[present]}[split]
        first = next(filter(free, ranked), None)
        if first is not None:
            return first
        if not any(map(free, self.names)):
            raise DataError(
                f"image {scene.image}: no object is left to ask about in split {split}; "
                "remove this image or choose more images"
            )
        # Drawn until it fits, as upstream does: the number of draws is part of what has to be reproduced.
        while not free(drawn := self.rng.choice(self.names)):
            pass
        return drawn


def question(name: str, template: str = TEMPLATE, compat_imange: bool = False) -> str:
    """The question about one object; "an" if its first letter is a vowel letter."""
    if name[:1] in VOWELS and name:
        template = template.replace("a", "an") if compat_imange else re.sub(r"\ba \{\}", "an {}", template)
    return template.format(name)


def read_scenes(path: str | os.PathLike[str]) -> list[Scene]:
    """Scenes from JSON Lines `{"image": name, "objects": [names]}`; a repeated object counts once.

    Raises DataError naming the line of a malformed record.
    """
    rows = files.read_rows(path)
    scenes = []
    for index, row in enumerate(rows):
        image, objects = row.get("image"), row.get("objects")
        if not isinstance(image, str) or not isinstance(objects, list) or not all(isinstance(o, str) for o in objects):
            raise DataError(f'{rows.place(index)}: expected {{"image": name, "objects": [names]}}; correct that line')
        scenes.append(Scene(image, tuple(dict.fromkeys(objects))))
    return scenes


def to_json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """The official file form: one JSON object per line, despite the suffix `.json` of the published files."""
    return "".join(json.dumps(record) + "\n" for record in records)
