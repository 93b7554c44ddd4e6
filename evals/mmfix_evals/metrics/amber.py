"""AMBER: free descriptions (generative) and yes/no questions (discriminative). The positive class is **"no"**.

Generative, over the object nouns of all responses: CHAIR = hallucinated / nouns, cover = truth words covered / truth
words, hal = responses with a hallucinated noun / responses, cog = hallucination targets named / targets.
Discriminative: accuracy = right / n, precision = right "no" / answered no, recall = right "no" / truth no,
F1 = 2PR/(P + R). All unrounded fractions; `official` holds the rounded percentages of the published script.
Paper: Wang et al. 2023, arXiv:2311.07397.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmfix_evals import files
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.files import place
from mmfix_evals.metrics import amber_text
from mmfix_evals.metrics.amber_counts import PARSERS, THRESHOLD, answer_counts, noun_counts
from mmfix_evals.metrics.amber_metrics import (
    BLOCKS,
    COUNT_KEYS,
    EXISTENCE_REMARK,
    GENERATIVE_KEYS,
    GENERATIVE_METRICS,
    METRICS,
    TYPES,
    UNDEFINED,
    amber_score,
    amber_score_of,
    official,
    values,
)
from mmfix_evals.metrics.amber_text import Similarity
from mmfix_evals.metrics.amber_truth import BLOCK_OF_TYPE, GENERATIVE, Amber, match, read_folder
from mmfix_evals.metrics.intervals import grouped, intervals, method

__all__ = [
    "COUNT_KEYS",
    "GENERATIVE_KEYS",
    "GENERATIVE_METRICS",
    "METRICS",
    "PARSERS",
    "SIMILARITIES",
    "TYPES",
    "Amber",
    "answer_counts",
    "noun_counts",
    "per_image",
    "read_folder",
    "score",
    "score_files",
]

SIMILARITIES = ("exact", "vectors")
Records = Sequence[Mapping[str, Any]]
Rows = list[tuple[str, int, dict[str, int]]]


def per_image(
    amber: Amber,
    responses: Records,
    block: str,
    similar: Similarity = amber_text.exact,
    threshold: float = THRESHOLD,
    parser: str = "official",
) -> dict[str, dict[str, int]]:
    """Picture → counts of "generative" (keys as in `GENERATIVE_KEYS`) or of a block of questions (`COUNT_KEYS`)."""
    return _per_image(amber, block, _rows(amber, responses, (block,), similar, threshold, parser))


def _per_image(amber: Amber, block: str, rows: Rows) -> dict[str, dict[str, int]]:
    keys = GENERATIVE_KEYS if block == GENERATIVE else COUNT_KEYS
    kinds = BLOCKS.get(block, (block,))
    return grouped([(amber.image(item), row) for kind, item, row in rows if kind in kinds], keys)


def score(
    amber: Amber,
    responses: Records,
    evaluation_type: str | None = None,
    similar: Similarity = amber_text.exact,
    threshold: float = THRESHOLD,
    parser: str = "official",
) -> dict[str, Any]:
    """Score responses `{"id", "response"}`; generative ones may carry their nouns under `nouns` instead.

    Args:
        amber: what they are scored against.
        responses: records; items without one are left out and reported.
        evaluation_type: one of `TYPES`; None for all that was answered.
        similar, threshold: see `noun_counts`.
        parser: one of `PARSERS`.

    Returns:
        `splits` (block → unrounded metrics, `n`, `n_expected`, `n_unparsed`, `counts`, `official`), `amber_score`,
        `evaluation_type`, `positive_class`, `parser`, `threshold`, `nouns` (given or nltk), `n`, `n_unparsed`,
        `intervals` (of `amber_score`; those of a block stand in the block), `interval_method`, `remarks`, `warnings`.

    Raises:
        DataError: a bad id or response; names the place.
        UsageError: unknown type or parser.
        MissingDependency: nouns have to be extracted and NLTK's data are not there.
    """
    if evaluation_type is None:
        kinds = {item["type"] == GENERATIVE for item, _ in match(amber.items, responses)}
        evaluation_type = {frozenset({True}): "g", frozenset({False}): "d"}.get(frozenset(kinds), "a")
    _choice("evaluation type", evaluation_type, TYPES)
    blocks = TYPES[evaluation_type]
    rows = _rows(amber, responses, blocks, similar, threshold, parser)
    expected = Counter(BLOCK_OF_TYPE.get(item["type"], GENERATIVE) for item in amber.items)
    splits = {block: _block(block, rows, expected) for block in blocks}
    for block, part in splits.items():
        keys, metrics = (GENERATIVE_KEYS, GENERATIVE_METRICS) if block == GENERATIVE else (COUNT_KEYS, METRICS)
        part["intervals"] = intervals(_per_image(amber, block, rows), keys, metrics, part["n"])
    f1, chair = splits.get("discriminative", {}).get("f1"), splits.get(GENERATIVE, {}).get("chair")
    questions = [row for kind, _, row in rows if kind != GENERATIVE]
    return {
        "amber_score": amber_score(chair, f1),
        "n": len(rows),
        "n_unparsed": sum(row["unparsed"] for row in questions),
        "evaluation_type": evaluation_type,
        "positive_class": "no",
        "parser": parser,
        "threshold": threshold,
        "nouns": _source_of_nouns(amber, responses) if GENERATIVE in blocks else None,
        "splits": splits,
        "intervals": _score_interval(amber, rows) if {GENERATIVE, "discriminative"} <= splits.keys() else {},
        "interval_method": method("image" if amber.images else "item", {amber.image(item) for _, item, _ in rows}),
        "remarks": ['precision, recall and F1 are of the answer "no"']
        + [f"existence: {EXISTENCE_REMARK}"] * ("existence" in blocks),
        "warnings": _warnings(splits, questions, parser),
    }


def _score_interval(amber: Amber, rows: Rows) -> dict[str, Any]:
    """That of `amber_score`, whose two halves are about the same images."""
    halves = [_per_image(amber, block, rows) for block in (GENERATIVE, "discriminative")]
    keys = (*(f"g.{key}" for key in GENERATIVE_KEYS), *(f"d.{key}" for key in COUNT_KEYS))
    joined: dict[str, dict[str, int]] = {}
    for start, half in zip("gd", halves, strict=True):
        for image, row in half.items():
            own = joined.setdefault(image, dict.fromkeys(keys, 0))
            own.update({f"{start}.{key}": count for key, count in row.items()})
    return intervals(joined, keys, {"amber_score": amber_score_of}, len(rows))


def _rows(
    amber: Amber, responses: Records, blocks: Sequence[str], similar: Similarity, threshold: float, parser: str
) -> Rows:
    """Kind of question, item id and counts of every response that belongs to one of the blocks."""
    _choice("AMBER parser", parser, PARSERS)
    kinds = {kind for block in blocks for kind in BLOCKS.get(block, (block,))}
    found: Rows = []
    described: list[tuple[Mapping[str, Any], int]] = []
    for item, index in match(amber.items, responses):
        kind = BLOCK_OF_TYPE.get(item["type"], GENERATIVE)
        if kind in kinds and kind == GENERATIVE:
            described.append((item, index))
        elif kind in kinds:
            found.append((kind, item["id"], answer_counts(item["truth"], _text(responses, index), parser)))
    extracted = _nouns(responses, [index for _, index in described])
    for (item, _), nouns in zip(described, extracted, strict=True):
        found.append((GENERATIVE, item["id"], noun_counts(nouns, item, amber, similar, threshold)))
    return found


def _text(responses: Records, index: int) -> str:
    text = responses[index].get("response")
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(f"{place(responses, index, 'response')}: 'response' is {kind}, not text; store the raw answer")
    return text


def _nouns(responses: Records, indices: Sequence[int]) -> list[list[str]]:
    texts, found = [], {}
    for index in indices:
        given = responses[index].get("nouns")
        if given is None:
            texts.append(index)
        elif isinstance(given, list) and all(isinstance(noun, str) for noun in given):
            found[index] = given
        else:
            raise DataError(f"{place(responses, index, 'response')}: 'nouns' must be a list of words")
    found |= dict(zip(texts, amber_text.nouns_of([_text(responses, index) for index in texts]), strict=True))
    return [found[index] for index in indices]


def _source_of_nouns(amber: Amber, responses: Records) -> str:
    items = match(amber.items, responses)
    given = {"nouns" in responses[index] for item, index in items if item["type"] == GENERATIVE}
    return {frozenset({True}): "given", frozenset({False}): "nltk"}.get(frozenset(given), "both" if given else "none")


def _block(block: str, rows: Rows, expected: Mapping[str, int]) -> dict[str, Any]:
    kinds = BLOCKS.get(block, (block,))
    chosen = [row for kind, _, row in rows if kind in kinds]
    keys = GENERATIVE_KEYS if block == GENERATIVE else COUNT_KEYS
    total = {key: sum(row[key] for row in chosen) for key in keys}
    remark = {"remark": EXISTENCE_REMARK} if block == "existence" else {}
    rest = {"n": len(chosen), "n_expected": sum(expected[kind] for kind in kinds), "counts": total}
    return values(block, total) | rest | {"official": official(block, total)} | remark


def _warnings(
    splits: Mapping[str, Mapping[str, Any]], questions: Sequence[Mapping[str, int]], parser: str
) -> list[str]:
    found = []
    for block, part in splits.items():
        found += [f"{block}: {name} is undefined: {UNDEFINED[name]}" for name in UNDEFINED if part.get(name, 0) is None]
        if part["n"] < part["n_expected"] and block in (GENERATIVE, *BLOCKS["discriminative"]):
            found.append(f"{block}: {part['n']} of {part['n_expected']} items have a response; the others are left out")
    unparsed = sum(row["unparsed"] for row in questions)
    if unparsed:
        rule = "are not exactly Yes or No" if parser == "official" else "do not contain exactly one of yes and no"
        found.append(f"{unparsed} of {len(questions)} answers {rule} and count as wrong")
    return found


def _choice(what: str, given: str, choices: Mapping[str, Any] | Sequence[str]) -> None:
    if given not in choices:
        raise UsageError(f"unknown {what} {given!r}; choose one of {', '.join(choices)}")


def score_files(
    responses: str | os.PathLike[str],
    data: str | os.PathLike[str],
    evaluation_type: str | None = None,
    similarity: str = "exact",
    vectors: str | os.PathLike[str] | None = None,
    threshold: float = THRESHOLD,
    parser: str = "official",
) -> dict[str, Any]:
    """Score a JSON list (or JSON Lines) of `{"id", "response"}` against AMBER's `data` folder.

    Args:
        responses: generative items may carry `nouns` instead of being taken apart by NLTK.
        data: folder with annotations.json, relation.json and safe_words.txt (each may be .gz).
        evaluation_type, threshold, parser: see `score`.
        similarity: "exact", or "vectors" with a file of word vectors; the published script uses spaCy's
            en_core_web_lg, whose numbers neither choice promises to reproduce.
        vectors: see `amber_text.read_vectors`.

    Returns:
        What `score` returns, with `similarity`, `responses_sha256`, `data_sha256` and, with vectors,
        `vectors_sha256` and `words_without_vector`.
    """
    _choice("similarity", similarity, SIMILARITIES)
    if (similarity == "vectors") != (vectors is not None):
        raise UsageError("similarity 'vectors' and a file of word vectors belong together; give both or neither")
    given = files.read_rows(responses)
    if not given:
        raise DataError(f"{responses}: contains no responses; give a JSON list of {{id, response}}")
    amber, hashes = read_folder(data)
    similar = amber_text.exact if vectors is None else amber_text.read_vectors(vectors, amber.vocabulary)
    result = score(amber, given, evaluation_type, similar, threshold, parser)
    result |= {"similarity": similarity, "responses_sha256": files.sha256(responses), "data_sha256": hashes}
    if isinstance(similar, amber_text.Vectors) and vectors is not None:
        result |= {"vectors_sha256": files.sha256(vectors), "words_without_vector": sorted(similar.unknown)}
    return result
