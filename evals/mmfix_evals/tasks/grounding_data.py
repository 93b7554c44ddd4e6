"""``tinyworld-grounding`` and ``grounding-coco``: pictures with masks."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmfix_evals.coco_scenes import annotation_pair
from mmfix_evals.metrics import chair, chair_truth
from mmfix_evals.tasks import data
from mmfix_evals.tasks.base import Document, register
from mmfix_evals.tasks.chair_coco import ChairCoco, _image_id
from mmfix_evals.tasks.grounding import GroundingTask
from mmfix_evals.tasks.tinyworld_pope import tinyworld_image

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

Masks = dict[str, NDArray[np.bool_]]


@register
class TinyWorldGrounding(GroundingTask):
    """The mask of an object is the box it was drawn in."""

    name = "tinyworld-grounding"
    title = "Grounding on TinyWorld: attention on the object being named"
    data_splits = ("train", "val", "dev", "test")

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        from mmfix_evals import tinyworld

        found = []
        for index in range(limit):
            scene = tinyworld.scene(data_split, index, world_seed)
            image = tinyworld.file_name(data_split, index, world_seed)
            boxes = [[placed.category, *placed.box] for placed in scene.objects]
            found.append(Document(image, data_split, image, tinyworld.CAPTION_PROMPT, {"boxes": boxes}))
        return found

    def image(self, name: str) -> Image:
        return tinyworld_image(name)

    def masks(self, document: Document) -> Masks:
        from mmfix_evals.tinyworld.world import SIZE

        found: Masks = {}
        for name, x, y, w, h in document.target["boxes"]:
            mask = found.setdefault(chair.coco_nodes()[name], np.zeros((SIZE, SIZE), dtype=np.bool_))
            mask[y : y + h, x : x + w] = True
        return found


@register
class GroundingCoco(GroundingTask):
    """The mask of an object is the union of COCO's segmentations of its category in the picture."""

    name = "grounding-coco"
    title = "Grounding on COCO val2014: attention on the object being named"
    data_splits = ("test",)
    splits = ("test",)
    options = ChairCoco.options

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        return [
            Document(one.doc_id, one.split, one.image, one.prompt, {"nodes": sorted(self._annotations(one.image))})
            for one in self._captions().documents(data_split, limit, world_seed)
        ]

    def _captions(self) -> Any:
        """The captioning task on the same pictures, with the same options."""
        task = ChairCoco()
        task._chosen = self._chosen
        return task

    def sources(self, data_split: str) -> dict[str, str]:
        return dict(self._captions().sources(data_split))

    def image(self, name: str) -> Image:
        return data.open_picture(data.root() / "coco/val2014" / name)

    def _annotations(self, image: str) -> Mapping[str, list[Any]]:
        """Node → annotations of a picture."""
        coco, nodes = _instances(annotation_pair(data.root() / "coco" / "annotations")[0])
        found: dict[str, list[Any]] = {}
        for annotation in coco.imgToAnns.get(int(_image_id(image)), ()):
            found.setdefault(nodes[annotation["category_id"]], []).append(annotation)
        return found

    def masks(self, document: Document) -> Masks:
        coco, _ = _instances(annotation_pair(data.root() / "coco" / "annotations")[0])
        found: Masks = {}
        for node, listed in self._annotations(document.image).items():
            for annotation in listed:
                mask = coco.annToMask(annotation).astype(bool)
                found[node] = found[node] | mask if node in found else mask
        return found


@lru_cache(maxsize=1)
def _instances(path: Path) -> tuple[Any, dict[int, str]]:
    """COCO's instances by pycocotools, and category number → CHAIR node."""
    coco = chair_truth.load(path)
    names = chair.coco_nodes()
    return coco, {number: names[category["name"]] for number, category in coco.cats.items()}
