"""AMBER's data: annotations, word associations, globally safe words; and responses that belong to them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmfix_evals import files
from mmfix_evals.errors import DataError
from mmfix_evals.files import place

GENERATIVE = "generative"
BLOCK_OF_TYPE = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
NAMES = ("annotations.json", "relation.json", "safe_words.txt")
"""The files of AMBER's `data` folder that scoring needs; each may be gzip with the ending .gz."""

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Amber:
    """What responses are scored against.

    Attributes:
        items: the annotations; item `id` stands at index `id - 1`.
        associations: word → words that stand for the same thing.
        safe: words that are neither hallucinated nor credited, whatever the picture.
        images: item id → picture, if `query_all.json` was given; clusters for intervals.
    """

    items: Records
    associations: Mapping[str, Sequence[str]]
    safe: frozenset[str]
    images: Mapping[int, str] = field(default_factory=dict)

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """The words that count as object mentions."""
        return frozenset(self.associations) | {word for words in self.associations.values() for word in words}

    def image(self, item: int) -> str:
        """The picture of an item, or the item itself where the pictures are not known."""
        return self.images.get(item, f"item {item}")


def read_folder(folder: str | os.PathLike[str]) -> tuple[Amber, dict[str, str]]:
    """AMBER's `data` folder and the sha256 of the files used. Raises DataError naming what is missing or malformed."""
    folder = Path(folder)
    paths = {name: _path(folder, name) for name in NAMES}
    items = files.read_rows(paths["annotations.json"])
    _check_items(items)
    relation = files.read_json(paths["relation.json"])
    if not isinstance(relation, dict) or not all(_words(words) for words in relation.values()):
        raise DataError(f"{paths['relation.json']}: must be an object {{word: [words]}}")
    for index, item in enumerate(items):
        strange = [word for key in ("truth", "hallu") for word in _listed(item, key) if word not in relation]
        if strange:
            raise DataError(f"{items.place(index)}: {', '.join(strange[:3])} not among the words of relation.json")
    safe = frozenset(files.read_text(paths["safe_words.txt"]).replace("\r\n", "\n").split("\n"))
    images: dict[Any, str] = {}
    query = _path(folder, "query_all.json", optional=True)
    if query.is_file():
        paths["query_all.json"] = query
        rows = files.read_rows(query)
        images = {row.get("id"): row["image"] for row in rows if isinstance(row.get("image"), str)}
    return Amber(items, relation, safe, images), {name: files.sha256(path) for name, path in paths.items()}


def _path(folder: Path, name: str, optional: bool = False) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    if optional:
        return folder / name
    raise DataError(f"{folder}: holds no {name}; give the data folder of AMBER with {', '.join(NAMES)}")


def _words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _listed(item: Mapping[str, Any], key: str) -> list[str]:
    return item[key] if item["type"] == GENERATIVE else []


def _check_items(items: files.Rows) -> None:
    for index, item in enumerate(items):
        kind, where = item.get("type"), items.place(index)
        if item.get("id") != index + 1:
            raise DataError(f"{where}: id is {item.get('id')!r}; item i must have the id i, counted from 1")
        if kind == GENERATIVE:
            if not (_words(item.get("truth")) and _words(item.get("hallu"))):
                raise DataError(f"{where}: 'truth' and 'hallu' must be lists of words")
        elif kind not in BLOCK_OF_TYPE:
            raise DataError(f"{where}: unknown type {kind!r}")
        elif item.get("truth") not in ("yes", "no"):
            raise DataError(f"{where}: 'truth' is {item.get('truth')!r}; it must be 'yes' or 'no'")


def match(items: Records, responses: Records) -> list[tuple[Mapping[str, Any], int]]:
    """Each response's item and the index of the response. DataError for a missing, unknown or repeated id."""
    found: list[tuple[Mapping[str, Any], int]] = []
    seen: dict[int, int] = {}
    for index, response in enumerate(responses):
        item = response.get("id")
        where = place(responses, index, "response")
        if not isinstance(item, int) or isinstance(item, bool) or not 1 <= item <= len(items):
            raise DataError(f"{where}: id is {item!r}; it must be a whole number from 1 to {len(items)}")
        if item in seen:
            raise DataError(f"{where}: id {item} occurs twice (first at {place(responses, seen[item], 'response')})")
        seen[item] = index
        found.append((items[item - 1], index))
    return found
