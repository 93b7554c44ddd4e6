"""From COCO annotations to the lists of objects that POPE questions are built from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmfix_evals import files
from mmfix_evals.errors import DataError
from mmfix_evals.metrics.chair import Chair
from mmfix_evals.pope_build import Scene

SPLIT = "val2014"


def annotation_pair(folder: str | os.PathLike[str], split: str = SPLIT) -> tuple[Path, Path]:
    """``instances_SPLIT.json`` and ``captions_SPLIT.json`` of a folder or of its ``annotations`` folder.

    Raises:
        DataError: names both files and where they come from.
    """
    for base in (Path(folder), Path(folder) / "annotations"):
        pair = base / f"instances_{split}.json", base / f"captions_{split}.json"
        if all(path.is_file() for path in pair):
            return pair
    raise DataError(
        f"{folder}: instances_{split}.json and captions_{split}.json are needed, here or in annotations/; "
        "unpack annotations_trainval2014.zip of https://cocodataset.org/#download there"
    )


def scenes_from_coco(folder: str | os.PathLike[str], split: str = SPLIT) -> list[Scene]:
    """One scene per image, in the order of the instances file.

    Objects are CHAIR's categories: those of the instance annotations in file order (crowds included), then those
    that only the reference captions name, each once.

    Raises:
        DataError: a file is missing or malformed, or holds a category that CHAIR's word table does not know.
    """
    instances, captions = (_read(path) for path in annotation_pair(folder, split))
    chair = Chair()
    place = annotation_pair(folder, split)[0]
    names = {}
    for category in instances.get("categories", ()):
        if str(category.get("name")) not in chair.nodes:
            raise DataError(f"{place}: category {category.get('name')!r} is not one of COCO's 80; check the file")
        names[category["id"]] = chair.nodes[category["name"]]
    pictures, objects = {}, {}
    for image in instances.get("images", ()):
        pictures[image["id"]] = image["file_name"]
        objects[image["id"]] = dict[str, None]()
    for annotation in instances["annotations"]:
        image, name = annotation.get("image_id"), names.get(annotation.get("category_id"))
        if image not in objects or name is None:
            raise DataError(f"{place}: annotation {annotation.get('id')} has no known category or image; correct it")
        objects[image][name] = None
    for annotation in captions["annotations"]:
        text, image = annotation.get("caption"), annotation.get("image_id")
        if not isinstance(text, str) or image not in objects:
            raise DataError(f"{place.name}'s captions: annotation {annotation.get('id')} has no text or known image")
        objects[image].update((mention.node, None) for mention in chair.mentions(text))
    return [Scene(pictures[image], tuple(found)) for image, found in objects.items()]


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _read(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise DataError(f"{path}: not a COCO annotation file (no list of annotations); check it")
    for key in ("images", "categories"):
        rows = content.get(key, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) and _is_id(row.get("id")) for row in rows):
            raise DataError(f"{path}: {key!r} is not a list of objects with an id; check it")
    for row in content["annotations"]:
        if not isinstance(row, dict) or not _is_id(row.get("image_id")) or not _is_id(row.get("category_id", 0)):
            raise DataError(f"{path}: an annotation is no object with an image; check it")
    if not all(isinstance(row.get("file_name"), str) for row in content.get("images", ())):
        raise DataError(f"{path}: an image has no file_name; check it")
    return content
