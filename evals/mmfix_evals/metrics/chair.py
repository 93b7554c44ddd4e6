"""CHAIR: which objects a caption names, and how many of them are not in the picture.

CHAIR_s = captions with a hallucinated mention / captions; CHAIR_i = hallucinated mentions / mentions (over the corpus,
duplicates counted). Recall = Σ|gt ∩ named| / Σ|gt|, precision = Σ|gt ∩ named| / Σ|named|, length = mean number of
tokens. A mention is hallucinated if its node is not in the ground truth of the image. Two flavours are in use and are
never comparable: "pattern" (the original, data-free here) and "wordnet" (OPERA, PAI, HALC; needs NLTK's data).
Paper: Rohrbach et al. 2018, arXiv:1809.02156.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, NamedTuple

from mmfix_evals import files
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics import chair_text, chair_truth, chair_wordnet
from mmfix_evals.metrics.chair_metrics import COUNT_KEYS, METRICS, ChairScore, total_score
from mmfix_evals.metrics.chair_text import FLAVOUR, Token, merge_double_words, merge_words
from mmfix_evals.metrics.coco_words import coco_nodes, read_synonyms

__all__ = [
    "COUNT_KEYS",
    "FLAVOUR",
    "FLAVOURS",
    "METRICS",
    "Analysis",
    "Chair",
    "ChairScore",
    "Mention",
    "coco_nodes",
    "counts",
    "ground_truth_from_coco",
    "read_ground_truth",
    "score_files",
]

FLAVOURS = {FLAVOUR: chair_text.tokens, "wordnet": chair_wordnet.tokens}
"""Flavour → from a caption to its tokens. The first is the default."""
UNKNOWN_IMAGE = ("error", "empty")
TRUNCATE = (None, "last-period")


class Mention(NamedTuple):
    """One object named in a caption: its category, the text `caption[start:end]` and the normalised word."""

    node: str
    start: int
    end: int
    word: str


class Analysis(NamedTuple):
    """The tokens of a caption after merging double words, and those that are mentions."""

    tokens: list[Token]
    mentions: list[Mention]


class Chair:
    """Finds and scores object mentions.

    Args:
        synonyms: None for the built-in table of COCO's 80 categories, a file in the published format, or a mapping
            from word to node. Words are matched in lower case and in the singular.
        flavour: one of `FLAVOURS`.

    Raises:
        DataError: unreadable synonyms file.
        UsageError: unknown flavour.
    """

    def __init__(
        self, synonyms: str | os.PathLike[str] | Mapping[str, str] | None = None, flavour: str = FLAVOUR
    ) -> None:
        _check_option("flavour", flavour, tuple(FLAVOURS))
        self.flavour = flavour
        if synonyms is None:
            self.nodes = coco_nodes()
        else:
            self.nodes = synonyms if isinstance(synonyms, Mapping) else read_synonyms(synonyms)

    def analyse(self, caption: str, limit: int | None = None) -> Analysis:
        """Tokens and mentions of a caption. `seat` does not count beside `toilet`, as in every version of CHAIR.

        Args:
            caption: the text as generated.
            limit: look at the first so many tokens only. A double word is one token and thus never cut in two.
        """
        merged = merge_double_words(FLAVOURS[self.flavour](caption))[:limit]
        dropped = _dropped([token.word for token in merged])
        found = [
            Mention(self.nodes[word], start, end, word)
            for word, start, end in merged
            if word in self.nodes and word != dropped
        ]
        return Analysis(merged, found)

    def mentions(self, caption: str) -> list[Mention]:
        """Every mention, in order of appearance; `start` and `end` index the caption as given."""
        return self.analyse(caption).mentions

    def counts(self, caption: str, gt_nodes: AbstractSet[str], limit: int | None = None) -> dict[str, int]:
        """Counts of one caption, keys as in `COUNT_KEYS`; sums of them give every metric.

        Args:
            caption: the text as generated.
            gt_nodes: nodes that are in the picture.
            limit: count in the first so many tokens only.
        """
        merged = merge_words(self._words(caption))[:limit]
        dropped = _dropped(merged)
        found = [self.nodes[word] for word in merged if word in self.nodes and word != dropped]
        named = set(found)
        hallucinated = sum(node not in gt_nodes for node in found)
        return {
            "hallucinated_caption": int(hallucinated > 0),
            "captions": 1,
            "hallucinated_mentions": hallucinated,
            "mentions": len(found),
            "covered": len(named & gt_nodes),
            "gt_objects": len(gt_nodes),
            "named_objects": len(named),
            "tokens": len(merged),
        }

    def _words(self, caption: str) -> Sequence[str]:
        if self.flavour == FLAVOUR:
            return chair_text.words(caption)
        return [token.word for token in FLAVOURS[self.flavour](caption)]

    def score(
        self,
        captions: Sequence[Mapping[str, Any]],
        gt: Mapping[str, AbstractSet[str]],
        unknown_image: str = "error",
        truncate: str | None = None,
    ) -> ChairScore:
        """Score captions `{"image_id", "caption"}`; empty captions count.

        Args:
            captions: records; an image may occur several times; ids match as text (7 and "7" are the same).
            gt: image id → nodes; never changed.
            unknown_image: "error" refuses ids without ground truth; "empty" gives them none, as upstream does, so
                that each of their mentions is hallucinated.
            truncate: "last-period" cuts each caption after its last "." (one without becomes empty).

        Raises:
            DataError: a record without id or text, or an unknown image; names the place.
            UsageError: unknown option value.
        """
        _check_option("unknown_image", unknown_image, UNKNOWN_IMAGE)
        _check_option("truncate", truncate, TRUNCATE)
        truth = {str(image): frozenset(nodes) for image, nodes in gt.items()}
        rows: list[tuple[str, dict[str, int]]] = []
        unknown, seen, repeated = set[str](), set[str](), set[str]()
        for index in range(len(captions)):
            image, caption = _record(captions, index)
            (repeated if image in seen else seen).add(image)
            if image not in truth:
                if unknown_image == "error":
                    raise DataError(
                        f"{files.place(captions, index, 'caption')}: image {image} is not in the ground truth; "
                        "give the ground truth of these images, or --unknown-image empty to give it no objects"
                    )
                unknown.add(image)
            if truncate == "last-period":
                caption = cut_after_last_period(caption)
            rows.append((image, self.counts(caption, truth.get(image, frozenset()))))
        strange = sorted(set().union(*truth.values()) - set(self.nodes.values()))
        return total_score(rows, len(unknown), strange, len(repeated), self.flavour)


def _dropped(words: Sequence[str]) -> str | None:
    return "seat" if "seat" in words and "toilet" in words else None


def _check_option(name: str, given: str | None, choices: Sequence[str | None]) -> None:
    if given not in choices:
        raise UsageError(f"{name} is {given!r}; choose one of {', '.join(map(str, choices))}")


def _record(captions: Sequence[Mapping[str, Any]], index: int) -> tuple[str, str]:
    record = captions[index]
    image, caption = record.get("image_id"), record.get("caption")
    if image is None or not isinstance(caption, str):
        missing = "image_id" if image is None else "caption"
        raise DataError(
            f"{files.place(captions, index, 'caption')}: {missing!r} is missing or of the wrong type; "
            'every record needs {"image_id": …, "caption": "text"}'
        )
    return str(image), caption


def cut_after_last_period(caption: str) -> str:
    """The caption up to its last "."; empty if it has none. Undoes the cut of a token limit in mid-sentence."""
    return caption[: caption.rfind(".") + 1]


def counts(caption: str, gt_nodes: AbstractSet[str]) -> dict[str, int]:
    """`Chair.counts` with the built-in table."""
    return Chair().counts(caption, gt_nodes)


def ground_truth_from_coco(folder: str | os.PathLike[str], chair: Chair | None = None) -> dict[str, set[str]]:
    """Image id → nodes of its instance annotations and of what its reference captions name.

    Args:
        folder: with COCO's `instances*.json` and `captions*.json` (the 2014 files alone if they are there).
        chair: vocabulary and flavour; default: the built-in words, flavour "pattern".

    Raises:
        DataError: files missing or malformed, or a category that the vocabulary does not know.
        MissingDependency: pycocotools is not installed.
    """
    scorer = chair or Chair()
    return chair_truth.from_coco(Path(folder), scorer.nodes, scorer.mentions, scorer.flavour)


def read_ground_truth(path: str | os.PathLike[str], chair: Chair | None = None) -> dict[str, set[str]]:
    """Ground truth from a JSON file `{image_id: [nodes]}` or a folder of COCO annotations."""
    return ground_truth_from_coco(path, chair) if Path(path).is_dir() else chair_truth.from_json(Path(path))


def score_files(
    captions_path: str | os.PathLike[str],
    ground_truth: str | os.PathLike[str],
    synonyms: str | os.PathLike[str] | None = None,
    unknown_image: str = "error",
    truncate: str | None = None,
    flavour: str = FLAVOUR,
) -> dict[str, Any]:
    """Score a JSON Lines file of `{"image_id", "caption"}` (gzip allowed) against ground truth (file or folder).

    Returns:
        `ChairScore.to_dict()` with `truncate`, `unknown_image` and `captions_sha256`.
    """
    captions = files.read_rows(captions_path)
    if not captions:
        raise DataError(f"{captions_path}: contains no captions; give one JSON object per line")
    chair = Chair(synonyms, flavour)
    score = chair.score(captions, read_ground_truth(ground_truth, chair), unknown_image, truncate)
    options = {"truncate": truncate, "unknown_image": unknown_image}
    return score.to_dict() | options | {"captions_sha256": files.sha256(captions_path)}
