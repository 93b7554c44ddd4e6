"""``pope-coco``, ``pope-aokvqa``, ``pope-gqa``: published (or built) POPE question files about real pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mmfix_evals import files
from mmfix_evals.errors import DataError
from mmfix_evals.metrics.pope_match import label_of
from mmfix_evals.tasks import data
from mmfix_evals.tasks.base import Document, register
from mmfix_evals.tasks.data import Source
from mmfix_evals.tasks.pope import PopeTask

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {
    "plain": "",
    "vcd": " Please answer this question with one word.",
    "llava": "\nAnswer the question using a single word or phrase.",
    "yesno": "\nPlease answer yes or no.",
}
"""Prompt style → what is appended to every question: nothing (OPERA, PAI), as VCD, as LLaVA and lmms-eval, as AMBER."""

COCO_PICTURES = ("coco/val2014", "http://images.cocodataset.org/zips/val2014.zip")
GQA_PICTURES = ("gqa/images", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip")
_POPE = "https://raw.githubusercontent.com/AoiDragon/POPE/08d957b917e5a378a2f99d35b6293c536a66298b/output/coco"
_VCD = (
    "https://raw.githubusercontent.com/DAMO-NLP-SG/VCD/d6568ff81b8fd306a49e630df44f2db5c2300191/experiments/data/POPE"
)


class PopeFiles(PopeTask):
    """Questions in the published format, one file per split; the first ``limit`` pictures in the order of the files."""

    data_splits = ("test",)
    options: ClassVar = {"prompt": tuple(SUFFIXES)}
    questions: ClassVar[dict[str, Source]]
    """Split → question file."""
    pictures: ClassVar[tuple[str, str]]
    """Folder of the pictures below the data folder, and where they come from."""

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        asked = {split: files.read_rows(path) for split, path in self._paths().items()}
        for rows in asked.values():
            for index, row in enumerate(rows):
                self.check(row, rows.place(index))
        order = dict.fromkeys(row["image"] for rows in asked.values() for row in rows)
        chosen = set(list(order)[:limit])
        data.need_pictures(self.name, self.pictures[0], sorted(chosen), self.pictures[1])
        return [
            self.document(split, number, row, SUFFIXES[self.option("prompt")])
            for split, rows in asked.items()
            for number, row in enumerate(rows, 1)
            if row["image"] in chosen
        ]

    def check(self, row: Mapping[str, Any], place: str) -> None:
        """Raise DataError naming ``place`` unless a row is a question."""
        if not isinstance(row.get("image"), str) or not isinstance(row.get("text"), str):
            raise DataError(f"{place}: no image or text; this is not a POPE question file")
        if label_of(row.get("label")) is None:
            raise DataError(f"{place}: label {row.get('label')!r} must be 'yes' or 'no'")

    def document(self, split: str, number: int, row: Mapping[str, Any], suffix: str) -> Document:
        """The document of a checked row, the ``number``-th of its file."""
        name = f"{split}/{row.get('question_id', number)}"
        return Document(name, split, row["image"], row["text"] + suffix, {"label": label_of(row["label"])})

    def _paths(self) -> dict[str, Path]:
        return dict(zip(self.questions, data.locate(self.name, list(self.questions.values())), strict=True))

    def sources(self, data_split: str) -> dict[str, str]:
        return {path.name: files.sha256(path) for path in self._paths().values()}

    def image(self, name: str) -> Image:
        return data.open_picture(data.root() / self.pictures[0] / name)


def _files(folder: str, base: str, stem: str, hashes: dict[str, str] | None = None) -> dict[str, Source]:
    """Split → file; the local name is plain even where the published one is longer."""
    plain = stem.removesuffix("_seem")
    return {
        split: Source(f"pope/{folder}/{plain}_{split}.json", f"{base}/{stem}_{split}.json", (hashes or {}).get(split))
        for split in PopeTask.splits
    }


def _vcd_files(name: str) -> dict[str, Source]:
    return _files(name, f"{_VCD}/{name}", f"{name}_pope_seem")


@register
class PopeCoco(PopeFiles):
    """The current official files; files from `mmfix eval build pope` under the same names will do."""

    name = "pope-coco"
    title = "POPE on COCO val2014: is there a … in the image?"
    pictures = COCO_PICTURES
    questions = _files(
        "coco",
        _POPE,
        "coco_pope",
        {
            "random": "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994",
            "popular": "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753",
            "adversarial": "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8",
        },
    )


@register
class PopeAokvqa(PopeFiles):
    """VCD's questions about A-OKVQA's pictures, which are COCO val2014."""

    name = "pope-aokvqa"
    title = "POPE on A-OKVQA (VCD's questions)"
    pictures = COCO_PICTURES
    questions = _vcd_files("aokvqa")


@register
class PopeGqa(PopeFiles):
    """VCD's questions about GQA's pictures."""

    name = "pope-gqa"
    title = "POPE on GQA (VCD's questions)"
    pictures = GQA_PICTURES
    questions = _vcd_files("gqa")
