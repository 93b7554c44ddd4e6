"""``pope-coco-chat``: PAI's multi-turn form of POPE, six questions about a picture in one conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from mmfix_evals.errors import DataError
from mmfix_evals.metrics import pope
from mmfix_evals.metrics.pope_match import label_of
from mmfix_evals.tasks.base import Document, Metric, register
from mmfix_evals.tasks.data import Source
from mmfix_evals.tasks.dialogue import converse, replies
from mmfix_evals.tasks.pope import PopeTask
from mmfix_evals.tasks.pope_files import COCO_PICTURES, PopeFiles

_PAI = "https://raw.githubusercontent.com/LALBJ/PAI/9bbd8bd57a0b0923f996197e4bd3e02cc10b8d58/pope_coco/chat"


@register
class PopeCocoChat(PopeFiles):
    """One document is one conversation; the response is the JSON list of the replies, each scored like any answer."""

    name = "pope-coco-chat"
    title = "POPE on COCO in conversations of six questions (PAI)"
    pictures = COCO_PICTURES
    questions: ClassVar[dict[str, Source]] = {
        split: Source(f"pope/coco/coco_pope_chat_{split}.json", f"{_PAI}/coco_pope_chat_{split}.json")
        for split in PopeTask.splits
    }
    # McNemar's test wants one outcome per document; here a document holds six.
    metrics: ClassVar[tuple[Metric, ...]] = tuple(replace(metric, outcome=None) for metric in PopeTask.metrics)
    unit = "conversations"

    def check(self, row: Mapping[str, Any], place: str) -> None:
        texts, labels = row.get("text"), row.get("label")
        if not isinstance(row.get("image"), str) or not isinstance(texts, list) or not isinstance(labels, list):
            raise DataError(f'{place}: expected {{"image": name, "text": [questions], "label": [yes or no]}}')
        if len(texts) != len(labels) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place}: {len(texts)} questions and {len(labels)} labels; every question needs one label")
        wrong = [label for label in labels if label_of(label) is None]
        if wrong:
            raise DataError(f"{place}: label {wrong[0]!r} must be 'yes' or 'no'")

    def document(self, split: str, number: int, row: Mapping[str, Any], suffix: str) -> Document:
        questions = [text + suffix for text in row["text"]]
        target = {"questions": questions, "labels": [label_of(label) for label in row["label"]]}
        name = f"{split}/{row.get('chat_id', number)}"
        return Document(name, split, row["image"], "\n\n".join(questions), target)

    def generate(
        self, decoder: Any, documents: Sequence[Document], shown: Sequence[Any], **arguments: Any
    ) -> list[Any]:
        return list(converse(decoder, [document.target["questions"] for document in documents], shown, **arguments))

    def verdicts(self, document: Document, response: str) -> dict[str, Any]:
        pairs = zip(replies(response), document.target["labels"], strict=True)
        return {"verdicts": [pope.verdicts(text, label) for text, label in pairs]}

    def counts(self, sample: Mapping[str, Any], flavour: str) -> Mapping[str, float]:
        rows = [
            pope.counts(label, text, flavour)
            for text, label in zip(replies(sample["response"]), sample["labels"], strict=True)
        ]
        return {name: sum(row[name] for row in rows) for name in self.columns}
