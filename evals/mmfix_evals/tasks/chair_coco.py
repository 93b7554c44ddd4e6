"""``chair-coco``: captions of COCO val2014 pictures, with the ground truth of the original metric."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mmfix_evals import files
from mmfix_evals.coco_scenes import annotation_pair
from mmfix_evals.errors import DataError
from mmfix_evals.metrics import chair
from mmfix_evals.metrics.nltk_data import missing_resources
from mmfix_evals.tasks import data
from mmfix_evals.tasks.base import Document, register
from mmfix_evals.tasks.chair import ChairTask
from mmfix_evals.tasks.pope_files import COCO_PICTURES

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = {
    "opera": "Please describe this image in detail.",
    "pai": "Please help me describe the image in detail.",
    "short": "Describe this image.",
}
"""Prompt style → prompt: as OPERA and HALC, as PAI, as POVID and CSR."""
ORDER_SEED = 0


@register
class ChairCoco(ChairTask):
    """CHAIR on COCO.

    Options: ``prompt`` (:data:`PROMPTS`), ``ids`` (a file with image ids or file names, in the order to use) and
    ``truncate=last-period`` (cuts every caption after its last period before scoring, for short token limits).
    Without ``ids`` the pictures are drawn from those present with a fixed seed, never taken in directory order; the
    ids and their hash stand in the results either way.
    """

    name = "chair-coco"
    title = "CHAIR on COCO val2014: hallucinated objects in captions"
    data_splits = ("test",)
    splits = ("test",)
    flavours = tuple(chair.FLAVOURS)
    max_new_tokens = 512
    options: ClassVar = {"prompt": tuple(PROMPTS), "truncate": ("none", "last-period"), "ids": None}

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        annotations = data.root() / "coco" / "annotations"
        annotation_pair(annotations)
        truth = {flavour: _truth(annotations, flavour) for flavour in self._flavours_here()}
        known = truth[chair.FLAVOUR]
        names = self._names(known)[:limit]
        data.need_pictures(self.name, COCO_PICTURES[0], names, COCO_PICTURES[1])
        found = []
        for name in names:
            target = {
                "ground_truth" if flavour == chair.FLAVOUR else f"ground_truth_{flavour}": sorted(
                    table[_image_id(name)]
                )
                for flavour, table in truth.items()
            }
            found.append(Document(name, data_split, name, PROMPTS[self.option("prompt")], target))
        return found

    def _flavours_here(self) -> list[str]:
        """Flavour "wordnet" has a ground truth of its own, which needs NLTK's data."""
        return [flavour for flavour in self.flavours if flavour == chair.FLAVOUR or not missing_resources()]

    def _names(self, known: Mapping[str, Any]) -> list[str]:
        chosen = self.option("ids")
        if chosen:
            names = read_ids(Path(chosen))
            strange = [name for name in names if _image_id(name) not in known]
            if strange:
                raise DataError(f"{chosen}: {strange[0]} is not in the annotations; give ids of COCO val2014")
            return names
        folder = data.root() / COCO_PICTURES[0]
        names = sorted(path.name for path in folder.glob("COCO_val2014_*.jpg") if _image_id(path.name) in known)
        if not names:
            data.need_pictures(self.name, COCO_PICTURES[0], ["COCO_val2014_*.jpg"], COCO_PICTURES[1])
        random.Random(ORDER_SEED).shuffle(names)
        return names

    def sources(self, data_split: str) -> dict[str, str]:
        pair = annotation_pair(data.root() / "coco" / "annotations")
        given = [Path(self.option("ids"))] if self.option("ids") else []
        return {path.name: files.sha256(path) for path in (*pair, *given)}

    def truth(self, sample: Mapping[str, Any], flavour: str) -> set[str]:
        if _key(flavour) not in sample:
            raise DataError(
                f"{self.name}: the samples hold no ground truth of flavour {flavour}, because NLTK's data were missing "
                "when they were made; run the task again with the data"
            )
        return set(sample[_key(flavour)])

    def caption(self, sample: Mapping[str, Any]) -> str:
        text = super().caption(sample)
        return chair.cut_after_last_period(text) if self.option("truncate") == "last-period" else text

    def image(self, name: str) -> Image:
        return data.open_picture(data.root() / COCO_PICTURES[0] / name)


@lru_cache(maxsize=4)
def _truth(folder: Path, flavour: str) -> dict[str, set[str]]:
    return chair.ground_truth_from_coco(folder, chair.Chair(flavour=flavour))


def _key(flavour: str) -> str:
    """Where a sample's line holds the ground truth of a flavour."""
    return "ground_truth" if flavour == chair.FLAVOUR else f"ground_truth_{flavour}"


def _image_id(name: str) -> str:
    """``COCO_val2014_000000000042.jpg`` → ``42``."""
    digits = re.search(r"(\d+)(?:\.\w+)?$", name)
    return str(int(digits[1])) if digits else ""


def read_ids(path: Path) -> list[str]:
    """File names from a list of ids or names: a JSON array, or one per line. Raises DataError for anything else."""
    if files.read_text(path).lstrip().startswith("["):
        given = files.read_json(path)
    else:
        given = [line.strip() for line in files.read_text(path).splitlines() if line.strip()]
    if not given:
        raise DataError(f"{path}: holds no image ids; give one per line")
    for number, one in enumerate(given, 1):
        if not re.fullmatch(r"(COCO_val2014_)?\d{1,12}(\.jpg)?", str(one)):
            raise DataError(f"{path}, item {number}: {one!r} is not an id or a file name of COCO val2014")
    names = [f"COCO_val2014_{int(_image_id(str(one))):012d}.jpg" for one in given]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice:
        raise DataError(f"{path}: {twice} is listed twice; list every picture once")
    return names
