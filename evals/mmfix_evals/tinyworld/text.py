"""What TinyWorld says: captions, questions and answers.

Training text is noisy on purpose, as text from the web is. A training caption names each missing partner with
probability 0.5 and a missing scene-typical object with probability 0.3, and forgets a far object with probability
0.12. A training answer to "Is there …?" is "yes" for 97 % of present objects, for 30 % of missing partners and 10 %
of missing scene-typical objects. Reference captions are truthful.
"""

from __future__ import annotations

import random

from mmfix_evals.tinyworld.world import CATEGORIES, SETTINGS, Scene, absent_partners, expected_absent, stream

CAPTION_PROMPT = "Please describe this image in detail."
QUESTION = "Is there {} in the image?"

NAME_PARTNER, NAME_TYPICAL, FORGET_FAR = 0.5, 0.3, 0.12
YES_PRESENT, YES_PARTNER, YES_TYPICAL = 0.97, 0.3, 0.1

_FIRST = (
    "This image shows a {scene} with {objects}.",
    "The picture shows {objects} in a {scene}.",
    "There is {objects} in this {scene}.",
)
_OFFICE = ("This image shows an {scene} with {objects}.", "The picture shows {objects} in an {scene}.", _FIRST[2])
_MORE = (
    "There is also {objects}.",
    "In the background there is {objects}.",
    "Next to that you can see {objects}.",
)


def with_article(name: str) -> str:
    """``an apple``, ``a bed``."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def question(name: str) -> str:
    """The POPE question about an object."""
    return QUESTION.format(with_article(name))


def caption(item: Scene, rng: random.Random, noisy: bool) -> str:
    """Two or three sentences: near objects first, far ones and partners late.

    Args:
        noisy: True writes a training caption, with the stated errors; False tells the truth.
    """
    near = [o.category for o in item.objects if o.near]
    far = [o.category for o in item.objects if not o.near]
    rng.shuffle(near)
    rng.shuffle(far)
    if noisy:
        far = [name for name in far if rng.random() >= FORGET_FAR]
        partners = sorted(absent_partners(item))
        typical = sorted(expected_absent(item) - set(partners))
        invented = [name for name in partners if rng.random() < NAME_PARTNER]
        if typical and rng.random() < NAME_TYPICAL:
            invented.append(rng.choice(typical))
        rng.shuffle(invented)
        far += invented
    linked = {partner for _, partner, _ in SETTINGS[item.scene].links}
    names = near + sorted(far, key=linked.__contains__)
    if not names:
        names = [item.objects[0].category]
    return _sentences(item.scene, names, rng)


def _sentences(place: str, names: list[str], rng: random.Random) -> str:
    first = min(len(names), rng.choice((2, 3)))
    opening = rng.choice(_OFFICE if place[0] in "aeiou" else _FIRST)
    parts = [opening.format(scene=place, objects=_listed(names[:first]))]
    rest = names[first:]
    while rest:
        some = min(len(rest), rng.choice((1, 2)))
        parts.append(rng.choice(_MORE).format(objects=_listed(rest[:some])))
        rest = rest[some:]
    return " ".join(parts)


def _listed(names: list[str]) -> str:
    words = [with_article(name) for name in names]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def references(item: Scene, count: int = 3) -> list[str]:
    """Truthful captions of a scene, the same for the same scene."""
    rng = stream("references", item.world_seed, item.split, item.image_id)
    return [caption(item, rng, noisy=False) for _ in range(count)]


def answer(item: Scene, name: str, rng: random.Random) -> str:
    """A training answer to the question about `name`: "Yes" or "No", with the stated label noise."""
    if name in item.categories:
        chance = YES_PRESENT
    elif name in absent_partners(item):
        chance = YES_PARTNER
    elif name in expected_absent(item):
        chance = YES_TYPICAL
    else:
        chance = 0.0
    return "Yes" if rng.random() < chance else "No"


def ask_about(item: Scene, count: int, rng: random.Random) -> list[str]:
    """Objects for training questions: half present, a fifth expected but absent, the rest any."""
    expected = sorted(expected_absent(item))
    names = []
    for _ in range(count):
        draw = rng.random()
        if draw < 0.5:
            names.append(rng.choice(item.categories))
        elif draw < 0.72 and expected:
            names.append(rng.choice(expected))
        else:
            names.append(rng.choice(CATEGORIES))
    return names
