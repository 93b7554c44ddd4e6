"""MuCR (Zhiyuan-Li-John/MuCR): causal links between two pictures, as choices out of four. Experimental.

The paper's formulas are not published as code; both tasks report plain 4-way accuracy, and the third of the benchmark
(explanations, judged by a model) is left out. Rows are JSON Lines with ``id``, ``cue``, ``false_cue`` (three),
``image_0`` (the cause) and ``image_1`` (the effect), the pictures as paths beside the file.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mmfix_evals import files, stats
from mmfix_evals.errors import DataError
from mmfix_evals.tasks import data
from mmfix_evals.tasks.base import Document, Metric, Task, register

if TYPE_CHECKING:
    from PIL.Image import Image

LETTERS = "ABCD"
BETWEEN = "|"
ROWS = data.Source(
    "mucr/mucr.jsonl",
    where="rows and pictures of https://huggingface.co/datasets/Pinkygin/MuCR, exported from its parquet files as JSON "
    "Lines with paths in image_0 and image_1",
)
_LETTER = re.compile(r"^\W*(?:answer|option|choice|image|picture)?\W*([A-D])\b", re.IGNORECASE)
_ALONE = re.compile(r"\b([B-D]|A(?!\s+[a-z]))\b")
_ARTICLE = re.compile(r"\W*a\s+[a-z]", re.IGNORECASE)


def chosen_letter(text: str) -> str | None:
    """The letter an answer settles on: at its beginning ("B.", "(b)", "Answer: B"), else the only capital A–D in it.

    The article of "A dog" is no letter.
    """
    first = None if _ARTICLE.match(text) else _LETTER.match(text.strip())
    if first and (first[1].isupper() or len(text.strip()) <= 3 or text.strip()[0] in "(["):
        return first[1].upper()
    alone = set(_ALONE.findall(text))
    return alone.pop() if len(alone) == 1 else None


class MucrTask(Task):
    """One of four; an answer without a letter is wrong and counted."""

    data_splits = ("test",)
    splits = ("test",)
    columns = ("n", "correct", "n_unparsed")
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", lambda c: stats.ratio(c[..., 1], c[..., 0]), headline=True, outcome="correct"),
        Metric("n_unparsed", lambda c: c[..., 2], percent=False, integer=True, better="lower"),
    )
    flavours = ("letter",)
    flavour_field = "parser"
    unit = "questions"
    max_new_tokens = 10
    prompt_is_data = True

    def rows(self) -> files.Rows:
        rows = files.read_rows(data.locate(self.name, [ROWS])[0])
        for index, row in enumerate(rows):
            texts = [row.get(name) for name in ("cue", "image_0", "image_1")]
            wrong = row.get("false_cue")
            if row.get("id") is None or not all(isinstance(text, str) and text for text in texts):
                raise DataError(f"{rows.place(index)}: needs id, cue, image_0 and image_1 (paths) as text")
            if not isinstance(wrong, list) or len(wrong) != 3 or not all(isinstance(text, str) for text in wrong):
                raise DataError(f"{rows.place(index)}: false_cue must be a list of three texts")
        return rows

    def sources(self, data_split: str) -> dict[str, str]:
        path = data.locate(self.name, [ROWS])[0]
        return {path.name: files.sha256(path)}

    def image(self, name: str) -> Image:
        return data.open_picture(data.root() / "mucr" / name)

    def show(self, document: Document) -> list[Image]:
        return [self.image(name) for name in document.image.split(BETWEEN)]

    def image_sha256(self, name: str) -> str:
        parts = [super(MucrTask, self).image_sha256(part) for part in name.split(BETWEEN)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def verdicts(self, document: Document, response: str) -> dict[str, Any]:
        return {"letter": chosen_letter(response)}

    def counts(self, sample: Mapping[str, Any], flavour: str) -> Mapping[str, float]:
        letter = chosen_letter(sample["response"])
        return {"n": 1, "correct": int(letter == sample["label"]), "n_unparsed": int(letter is None)}


def _shuffled(right: str, wrong: list[str], key: str) -> tuple[list[str], str]:
    """The four choices in an order that depends on the row alone, and the right letter."""
    rng = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
    choices = [right, *wrong]
    order = rng.sample(range(4), 4)
    return [choices[n] for n in order], LETTERS[order.index(0)]


@register
class MucrCue(MucrTask):
    """Both pictures are shown; which phrase is the cue that links them?"""

    name = "mucr-cue"
    title = "MuCR, phrase level (experimental): the cue that links cause and effect, out of four"

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        found = []
        rows = self.rows()[:limit]
        pictures = [row[name] for row in rows for name in ("image_0", "image_1")]
        data.need_pictures(self.name, "mucr", pictures, ROWS.where)
        for row in rows:
            choices, label = _shuffled(row["cue"], row["false_cue"], f"cue/{row['id']}")
            listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
            prompt = (
                "The first image shows a cause, the second its effect. Which phrase names what links them?\n"
                f"{listed}\nAnswer with one letter."
            )
            image = BETWEEN.join((row["image_0"], row["image_1"]))
            found.append(Document(str(row["id"]), data_split, image, prompt, {"label": label}))
        return found


@register
class MucrEffect(MucrTask):
    """The cause is shown, then four candidates: its effect and the effects of three other rows."""

    name = "mucr-effect"
    title = "MuCR, image level (experimental): the effect of a cause, out of four pictures"

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        rows = self.rows()
        effects = list(dict.fromkeys(row["image_1"] for row in rows))
        if len(effects) < 4:
            raise DataError(f"{self.name}: {len(effects)} effect pictures; four rows with different effects are needed")
        found = []
        for row in rows[:limit]:
            key = f"effect/{row['id']}"
            rng = random.Random(int.from_bytes(hashlib.sha256(f"{key}/others".encode()).digest()[:8], "big"))
            others = rng.sample([name for name in effects if name != row["image_1"]], 3)
            choices, label = _shuffled(row["image_1"], others, key)
            prompt = (
                "The first image shows a cause. The next four images are A, B, C and D, in this order. Which of them "
                "shows its effect? Answer with one letter."
            )
            image = BETWEEN.join((row["image_0"], *choices))
            found.append(Document(str(row["id"]), data_split, image, prompt, {"label": label}))
        needed = [name for document in found for name in document.image.split(BETWEEN)]
        data.need_pictures(self.name, "mucr", needed, ROWS.where)
        return found
