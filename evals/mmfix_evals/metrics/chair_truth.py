"""CHAIR's ground truth: a JSON table, or COCO annotations reduced to one (and remembered in the user's cache)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mmfix_evals import files
from mmfix_evals.errors import DataError, MissingDependency

RECIPE = 1
"""Raised whenever the reduction changes, so that older cache files are not used."""


class _Named(Protocol):
    @property
    def node(self) -> str: ...


def from_json(path: Path) -> dict[str, set[str]]:
    """`{image_id: [node, …]}`. Raises DataError naming the image of a wrong entry."""
    table = files.read_json(path)
    if not isinstance(table, dict):
        raise DataError(f"{path}: expected a JSON object {{image_id: [words]}}, found {type(table).__name__}")
    for image, nodes in table.items():
        if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
            raise DataError(f"{path}: the entry of image {image} is not a list of words; correct it")
    return {image: set(nodes) for image, nodes in table.items()}


def from_coco(
    folder: Path, nodes: Mapping[str, str], mentions: Callable[[str], Iterable[_Named]], flavour: str
) -> dict[str, set[str]]:
    """Image id → nodes of all its instance annotations (crowds included) ∪ nodes its reference captions name.

    Images without any of these get an empty set. The result is cached under the hash of the annotation files, the
    words and the flavour.
    """
    pairs = annotation_files(folder)
    key = _key([path for pair in pairs for path in pair], nodes, flavour)
    cache = files.cache_dir() / "chair" / f"{key}.json"
    found = _from_cache(cache, key)
    if found is None:
        found = {}
        for instances, captions in pairs:
            _add_instances(found, instances, nodes)
            _add_captions(found, captions, mentions)
        _to_cache(cache, key, found)
    return found


def annotation_files(folder: Path) -> list[tuple[Path, Path]]:
    """(instances, captions) files that belong together: COCO 2014 if the folder has it, otherwise every pair."""
    instances = {path.name.removeprefix("instances"): path for path in folder.glob("instances*.json")}
    captions = {path.name.removeprefix("captions"): path for path in folder.glob("captions*.json")}
    endings = sorted(instances.keys() | captions.keys())
    chosen = [ending for ending in endings if ending in ("_train2014.json", "_val2014.json")] or endings
    if not chosen:
        raise DataError(f"{folder}: no instances*.json and captions*.json; give the folder of COCO annotations")
    for ending in chosen:
        for name, present in (("instances", instances), ("captions", captions)):
            if ending not in present:
                raise DataError(f"{folder / (name + ending)}: no such file; CHAIR needs instances and captions")
    return [(instances[ending], captions[ending]) for ending in chosen]


def _load(path: Path) -> Any:
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise MissingDependency(
            f"COCO annotations are read with pycocotools, which cannot be imported ({error}); "
            "run: pip install 'mmfix[eval]'"
        ) from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = _dataset(path)
            coco.createIndex()
            return coco
    except DataError:
        raise
    except Exception as error:  # pycocotools asserts and indexes without checks
        raise DataError(f"{path}: not a COCO annotation file ({type(error).__name__}: {error}); check it") from None


def _dataset(path: Path) -> dict[str, Any]:
    """The content of an annotation file, with what is used of it checked."""
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a COCO annotation file (a {type(content).__name__}, not an object); check it")
    for part, names in (("images", ("id",)), ("categories", ("id", "name")), ("annotations", ("id", "image_id"))):
        rows = content.get(part, [])
        if not isinstance(rows, list):
            raise DataError(f"{path}: not a COCO annotation file: {part!r} is not a list; check it")
        for number, row in enumerate(rows, 1):
            for name in names:
                value = row.get(name) if isinstance(row, dict) else None
                if isinstance(value, bool) or not isinstance(value, str if name == "name" else (int, str)):
                    what = f"{name!r} of item {number} of {part!r} is missing or of a wrong type"
                    raise DataError(f"{path}: not a COCO annotation file: {what}; check it")
    return content


def _add_instances(found: dict[str, set[str]], path: Path, nodes: Mapping[str, str]) -> None:
    coco = _load(path)
    unknown = sorted({category["name"] for category in coco.cats.values()} - nodes.keys())
    if unknown:
        raise DataError(f"{path}: no words for the categories {', '.join(unknown[:5])}; give --synonyms FILE with them")
    names = {number: nodes[category["name"]] for number, category in coco.cats.items()}
    for image in coco.imgs:
        found.setdefault(str(image), set())
    for annotation in coco.dataset.get("annotations", ()):
        node = names.get(annotation.get("category_id"))
        if node is None or "image_id" not in annotation:
            raise DataError(f"{path}: annotation {annotation.get('id')} has no known category or image; correct it")
        found.setdefault(str(annotation["image_id"]), set()).add(node)


def _add_captions(found: dict[str, set[str]], path: Path, mentions: Callable[[str], Iterable[_Named]]) -> None:
    coco = _load(path)
    for image in coco.imgs:
        found.setdefault(str(image), set())
    for annotation in coco.dataset.get("annotations", ()):
        if not isinstance(annotation.get("caption"), str) or "image_id" not in annotation:
            raise DataError(f"{path}: annotation {annotation.get('id')} has no caption or image; correct it")
        named = {mention.node for mention in mentions(annotation["caption"])}
        found.setdefault(str(annotation["image_id"]), set()).update(named)


def _key(paths: Iterable[Path], nodes: Mapping[str, str], flavour: str) -> str:
    parts: dict[str, Any] = {
        "recipe": RECIPE,
        "flavour": flavour,
        "words": sorted(nodes.items()),
        "files": [files.sha256(path) for path in paths],
        "versions": {name: _version(name) for name in ("nltk", "textblob")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _from_cache(path: Path, key: str) -> dict[str, set[str]] | None:
    """The cached table; None if there is none or it is damaged (it is then built again)."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] != key:
            return None
        table = stored["ground_truth"]
        if not all(isinstance(node, str) for nodes in table.values() for node in nodes):
            return None
        return {image: set(nodes) for image, nodes in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _to_cache(path: Path, key: str, table: Mapping[str, set[str]]) -> None:
    content = {"key": key, "ground_truth": {image: sorted(nodes) for image, nodes in table.items()}}
    # A cache that cannot be written costs time at the next run, nothing else.
    with contextlib.suppress(OSError):
        files.write_text_atomic(path, json.dumps(content))
