"""``tinyworld-chair``: one caption per picture of the synthetic world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmfix_evals.metrics import chair
from mmfix_evals.tasks.base import Document, register
from mmfix_evals.tasks.chair import ChairTask
from mmfix_evals.tasks.tinyworld_pope import tinyworld_image

if TYPE_CHECKING:
    from PIL.Image import Image


@register
class TinyWorldChair(ChairTask):
    """Ground truth: the drawn objects and whatever the reference captions name."""

    name = "tinyworld-chair"
    title = "CHAIR on TinyWorld: hallucinated objects in captions"
    data_splits = ("train", "val", "dev", "test")

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        from mmfix_evals import tinyworld

        scorer = chair.Chair()
        found = []
        for index in range(limit):
            scene = tinyworld.scene(data_split, index, world_seed)
            truth = set(scene.categories)
            for caption in tinyworld.references(scene):
                truth |= {mention.node for mention in scorer.mentions(caption)}
            target = {"ground_truth": sorted(truth), "expected": sorted(set(tinyworld.expected_absent(scene)) - truth)}
            image = tinyworld.file_name(data_split, index, world_seed)
            found.append(Document(image, data_split, image, tinyworld.CAPTION_PROMPT, target))
        return found

    def image(self, name: str) -> Image:
        return tinyworld_image(name)
