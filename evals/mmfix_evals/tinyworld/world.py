"""The rules of TinyWorld: scenes, categories, the prior, and the sampling of pictures.

Every picture is a pure function of ``(split, index, world_seed)``; no global random state is read or changed.

The prior. A scene has *links*, pairs (anchor, partner): the anchor is drawn with its own probability, the partner
follows a present anchor with probability 0.8 in ``train`` and ``val`` and 0.25 in ``dev`` and ``test``. *Extras* are
typical of the scene without a link. An object foreign to the scene is added with probability 0.35 (``train``,
``val``) or 0.5 (``dev``, ``test``). A model that leans on the prior is right in ``val`` and wrong in ``test``.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

SIZE = 96
"""Side of a picture in pixels."""
SPLITS = ("train", "val", "dev", "test")
PRIOR_SPLITS = ("train", "val")
MIN_OBJECTS, MAX_OBJECTS = 3, 6
FAR_PARTNER = 0.45
"""Probability that the partner of a link is drawn far away (small)."""
FAR_OTHER = 0.3
MAX_COVER = 0.3
"""Share of the smaller box that a pair of boxes may have in common before another place is tried."""

# Width and height in pixels at scale 1. All names are COCO categories that CHAIR's word table recognises after its
# own singular rule; "bus" is left out because that rule turns it into "bu".
NOMINAL: dict[str, tuple[int, int]] = {
    "person": (20, 42),
    "bicycle": (42, 28),
    "car": (42, 22),
    "truck": (44, 28),
    "traffic light": (16, 40),
    "stop sign": (24, 40),
    "bench": (42, 24),
    "bird": (30, 24),
    "cat": (26, 34),
    "dog": (38, 28),
    "umbrella": (36, 36),
    "frisbee": (30, 14),
    "kite": (30, 40),
    "surfboard": (16, 42),
    "boat": (40, 38),
    "bottle": (14, 38),
    "cup": (28, 26),
    "fork": (12, 40),
    "knife": (10, 42),
    "bowl": (38, 20),
    "banana": (38, 22),
    "apple": (26, 28),
    "orange": (26, 26),
    "chair": (24, 38),
    "vase": (20, 40),
    "bed": (44, 28),
    "tv": (40, 32),
    "laptop": (38, 28),
    "book": (26, 32),
    "clock": (28, 28),
}
CATEGORIES = tuple(NOMINAL)


@dataclass(frozen=True)
class Setting:
    """What a scene contains: ``links`` of (anchor, partner, probability of the anchor) and ``extras``."""

    links: tuple[tuple[str, str, float], ...]
    extras: tuple[tuple[str, float], ...]

    @property
    def typical(self) -> frozenset[str]:
        """Every category at home in this scene."""
        linked = {name for anchor, partner, _ in self.links for name in (anchor, partner)}
        return frozenset(linked | {name for name, _ in self.extras})


SETTINGS: dict[str, Setting] = {
    "kitchen": Setting(
        (("fork", "knife", 0.55), ("bowl", "cup", 0.55), ("apple", "banana", 0.45)),
        (("bottle", 0.25), ("orange", 0.25)),
    ),
    "bedroom": Setting(
        (("bed", "book", 0.6), ("tv", "clock", 0.5), ("cat", "vase", 0.35)),
        (("chair", 0.25), ("laptop", 0.15)),
    ),
    "office": Setting(
        (("laptop", "cup", 0.6), ("chair", "clock", 0.5), ("book", "bottle", 0.4)),
        (("vase", 0.2), ("person", 0.25)),
    ),
    "street": Setting(
        (("car", "traffic light", 0.55), ("truck", "stop sign", 0.45), ("bicycle", "person", 0.4)),
        (("dog", 0.2), ("umbrella", 0.15)),
    ),
    "park": Setting(
        (("bench", "bird", 0.5), ("dog", "frisbee", 0.5), ("kite", "person", 0.45)),
        (("bicycle", 0.2), ("apple", 0.1)),
    ),
    "beach": Setting(
        (("boat", "surfboard", 0.5), ("umbrella", "chair", 0.55), ("person", "kite", 0.4)),
        (("bird", 0.2), ("bottle", 0.15)),
    ),
}
SCENES = tuple(SETTINGS)


@dataclass(frozen=True)
class PlacedObject:
    """One object: its category, its box ``(x, y, w, h)`` in pixels, and whether it is near (large) or far (small)."""

    category: str
    box: tuple[int, int, int, int]
    near: bool


@dataclass(frozen=True)
class Scene:
    """The description of one picture. ``seed`` fixes colours and noise; ``split`` and ``world_seed`` name it."""

    image_id: int
    scene: str
    objects: tuple[PlacedObject, ...]
    seed: int
    split: str
    world_seed: int = 0

    @property
    def categories(self) -> tuple[str, ...]:
        """Present categories, each once, in a fixed but arbitrary order."""
        return tuple(item.category for item in self.objects)


def stream(*key: object) -> random.Random:
    """An independent generator named by ``key``, the same on every machine and Python version."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def scene(split: str, index: int, world_seed: int = 0) -> Scene:
    """The ``index``-th scene of a split.

    Args:
        split: one of :data:`SPLITS`.
        index: any integer >= 0.
        world_seed: another value draws other pictures from the same rules.

    Raises:
        ValueError: for an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown TinyWorld split {split!r}: choose one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"the picture index must be 0 or more, got {index}")
    rng = stream("tinyworld", world_seed, split, index)
    place = rng.choice(SCENES)
    names = _draw_categories(place, split in PRIOR_SPLITS, rng)
    objects = _place(names, {partner for _, partner, _ in SETTINGS[place].links}, rng)
    return Scene(index, place, objects, rng.getrandbits(32), split, world_seed)


def _draw_categories(place: str, prior: bool, rng: random.Random) -> list[str]:
    setting = SETTINGS[place]
    follow, foreign = (0.8, 0.35) if prior else (0.25, 0.5)
    anchors = [link for link in setting.links if rng.random() < link[2]] or [rng.choice(setting.links)]
    names = [anchor for anchor, _, _ in anchors]
    names += [partner for _, partner, _ in anchors if rng.random() < follow]
    names += [extra for extra, chance in setting.extras if rng.random() < chance]
    strangers = [name for name in CATEGORIES if name not in setting.typical]
    if rng.random() < foreign:
        names.append(rng.choice(strangers))
    names = list(dict.fromkeys(names))
    rng.shuffle(names)
    names = names[:MAX_OBJECTS]
    # POPE asks about three present objects, so every picture has three. The filler follows the split's own rule:
    # mostly at home where the prior holds, mostly foreign where it does not, and never the missing partner.
    expected = {partner for anchor, partner, _ in setting.links if anchor in names}
    at_home = [name for name in sorted(setting.typical) if name not in expected]
    while len(names) < MIN_OBJECTS:
        pool = at_home if rng.random() < (0.7 if prior else 0.4) else strangers
        name = rng.choice(pool)
        if name not in names:
            names.append(name)
    return names


def _place(names: list[str], partners: set[str], rng: random.Random) -> tuple[PlacedObject, ...]:
    placed: list[PlacedObject] = []
    for name in names:
        near = rng.random() >= (FAR_PARTNER if name in partners else FAR_OTHER)
        scale = rng.uniform(0.72, 1.0) if near else rng.uniform(0.38, 0.55)
        w, h = (max(6, round(side * scale)) for side in NOMINAL[name])
        top = 26 if near else 8  # near objects stand lower in the picture
        tries = [
            (rng.randint(1, SIZE - w - 1), rng.randint(min(top, SIZE - h - 2), SIZE - h - 1), w, h) for _ in range(40)
        ]
        free = [box for box in tries if all(_cover(box, other.box) <= MAX_COVER * 0.2 for other in placed)]
        box = free[0] if free else min(tries, key=lambda b: max(_cover(b, other.box) for other in placed))
        placed.append(PlacedObject(name, box, near))
    return tuple(placed)


def _cover(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Common area of two boxes as a share of the smaller one."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / min(a[2] * a[3], b[2] * b[3])


def absent_partners(item: Scene) -> frozenset[str]:
    """Partners of present anchors that are missing: what the prior expects most."""
    present = set(item.categories)
    links = SETTINGS[item.scene].links
    return frozenset(partner for anchor, partner, _ in links if anchor in present and partner not in present)


def expected_absent(item: Scene) -> frozenset[str]:
    """Objects the prior expects here but which are absent: missing partners and missing scene-typical objects."""
    return absent_partners(item) | (SETTINGS[item.scene].typical - set(item.categories))


def file_name(split: str, index: int, world_seed: int = 0) -> str:
    """``tinyworld_test_000000000012.png``; a world seed other than 0 is part of the name (``tinyworld-w3_test_…``)."""
    world = f"-w{world_seed}" if world_seed else ""
    return f"tinyworld{world}_{split}_{index:012d}.png"


def image_index(name: str) -> tuple[str, int, int]:
    """``(split, index, world_seed)`` parsed from a file name or a path that ends in one."""
    match = re.search(r"tinyworld(?:-w(\d+))?_(\w+)_(\d{12})(?:\.png)?$", name)
    if not match or match[2] not in SPLITS:
        raise ValueError(f"{name!r} is not a TinyWorld picture name such as {file_name('test', 12)!r}")
    return match[2], int(match[3]), int(match[1] or 0)
