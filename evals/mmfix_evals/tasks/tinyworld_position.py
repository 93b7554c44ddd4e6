"""``tinyworld-position``: does the answer about two pictures depend on their order?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mmfix_evals import stats
from mmfix_evals.errors import DataError
from mmfix_evals.tasks.base import Counts, Document, Metric, register
from mmfix_evals.tasks.pairs import PairTask, share, unparsed
from mmfix_evals.tasks.tinyworld_pope import tinyworld_image

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("pairs", "consistent", "right", "in_one", "yes_if_first", "yes_if_second", "n_unparsed")
BETWEEN = "|"


def _gap(c: Counts) -> Counts:
    first, second, below = (c[..., COLUMNS.index(name)] for name in ("yes_if_first", "yes_if_second", "in_one"))
    return stats.ratio(first - second, below)


@register
class TinyWorldPosition(PairTask):
    """ "Is there a … in any picture?" about two pictures, asked again with the pictures exchanged.

    ``consistency`` = pairs with the same verdict in both orders / pairs. ``position_gap`` = how much more often a
    model says yes when the only picture with the object stands first than when it stands second.
    """

    name = "tinyworld-position"
    title = "Position bias on TinyWorld: two pictures, both orders"
    data_splits = ("train", "val", "dev", "test")
    splits = ()
    first, second = "forward", "exchanged"
    columns = COLUMNS
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("consistency", share(COLUMNS, "consistent", "pairs"), headline=True, outcome="consistent"),
        Metric("accuracy", share(COLUMNS, "right", "pairs", 2.0), headline=True),
        Metric("position_gap", _gap, headline=True, better=None),
        Metric("yes_if_first", share(COLUMNS, "yes_if_first", "in_one"), better=None),
        Metric("yes_if_second", share(COLUMNS, "yes_if_second", "in_one"), better=None),
        unparsed(COLUMNS),
    )

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        """``limit`` counts pictures; two neighbours are shown together."""
        from mmfix_evals import tinyworld
        from mmfix_evals.tinyworld import text
        from mmfix_evals.tinyworld.world import stream

        if limit < 2:
            raise DataError(f"{self.name} shows two pictures together: raise --limit to at least 2")
        found = []
        for index in range(0, limit - 1, 2):
            pair = [tinyworld.scene(data_split, n, world_seed) for n in (index, index + 1)]
            left, right = (set(scene.categories) for scene in pair)
            names = [tinyworld.file_name(data_split, n, world_seed) for n in (index, index + 1)]
            rng = stream("position", world_seed, data_split, index)
            pools = {
                "left": sorted(left - right),
                "right": sorted(right - left),
                "neither": sorted(set(tinyworld.CATEGORIES) - left - right),
            }
            for place, pool in pools.items():
                if pool:
                    name = rng.choice(pool)
                    prompt = f"Is there {text.with_article(name)} in any picture?"
                    target = {"object": name, "place": place, "label": "no" if place == "neither" else "yes"}
                    image = BETWEEN.join(names)
                    found += [
                        Document(f"{image}/{name}/{variant}", data_split, image, prompt, target)
                        for variant in (self.first, self.second)
                    ]
        return found

    def image(self, name: str) -> Image:
        return tinyworld_image(name)

    def show(self, document: Document) -> list[Image]:
        names = document.image.split(BETWEEN)
        exchanged = document.doc_id.endswith(f"/{self.second}")
        return [self.image(name) for name in (reversed(names) if exchanged else names)]

    def image_sha256(self, name: str) -> str:
        parts = [super(TinyWorldPosition, self).image_sha256(part) for part in name.split(BETWEEN)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def pair_counts(self, sample: Mapping[str, Any], first: str, second: str) -> Mapping[str, float]:
        place, label = sample["place"], sample["label"]
        left_first, left_second = (first, second) if place == "left" else (second, first)
        one = place != "neither"
        return {
            "pairs": 1,
            "consistent": int(first == second != "unparsed"),
            "right": int(first == label) + int(second == label),
            "in_one": int(one),
            "yes_if_first": int(one and left_first == "yes"),
            "yes_if_second": int(one and left_second == "yes"),
        }
