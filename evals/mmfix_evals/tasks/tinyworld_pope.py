"""``tinyworld-pope``: yes/no questions about the synthetic world, six per picture and split."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from mmfix_evals.errors import DataError
from mmfix_evals.tasks.base import Document, register
from mmfix_evals.tasks.pope import PopeTask

if TYPE_CHECKING:
    from PIL.Image import Image


@lru_cache(maxsize=1024)
def tinyworld_image(name: str) -> Image:
    """The picture of a TinyWorld file name. Pictures are drawn, not read, so they are kept for the next question."""
    from mmfix_evals import tinyworld

    return tinyworld.render(tinyworld.scene(*tinyworld.image_index(name)))


@register
class TinyWorldPope(PopeTask):
    """Random, popular and adversarial questions, built as POPE builds them from the pictures of one split."""

    name = "tinyworld-pope"
    title = "POPE on TinyWorld: is there a … in the image?"
    data_splits = ("train", "val", "dev", "test")

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        from mmfix_evals import tinyworld

        try:
            asked = tinyworld.pope_questions(data_split, limit, world_seed=world_seed)
        except DataError as problem:
            raise DataError(f"{limit} TinyWorld pictures are too few for POPE ({problem}): raise --limit") from None
        return [
            Document(f"{split}/{question['question_id']}", split, question["image"], question["text"],
                     {"label": question["label"]})
            for split in self.splits
            for question in asked[split]
        ]  # fmt: skip

    def image(self, name: str) -> Image:
        return tinyworld_image(name)
