"""Reading MME result files, and which two lines belong to one picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfix_evals import files
from mmfix_evals.errors import DataError
from mmfix_evals.files import place

FIELDS = ("image", "question", "gt", "pred")

Records = Sequence[Mapping[str, Any]]


def read_folder(folder: str | os.PathLike[str], tasks: Sequence[str]) -> tuple[dict[str, files.Rows], dict[str, str]]:
    """The records of every `<task>.txt` in a folder, and the sha256 of the files. DataError if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder with the <task>.txt files of MME")
    paths = {task: folder / f"{task}.txt" for task in tasks if (folder / f"{task}.txt").is_file()}
    if not paths:
        raise DataError(f"{folder}: holds none of the files {', '.join(f'{task}.txt' for task in tasks)}")
    return {task: read_task(path) for task, path in paths.items()}, {t: files.sha256(p) for t, p in paths.items()}


def read_task(path: str | os.PathLike[str]) -> files.Rows:
    """Records `{"image", "question", "gt", "pred"}` of one file; the line break is not part of `pred`.

    A tab in the prediction stays in it. Blank lines are ignored. Raises DataError naming the line.
    """
    path = Path(path)
    text = files.read_text(path).replace("\r\n", "\n")
    rows, numbers = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        fields = line.split("\t", len(FIELDS) - 1)
        if len(fields) < len(FIELDS):
            raise DataError(
                f"{path}, line {number}: {len(fields)} fields instead of image, question, gt and pred separated by "
                "tabs; a line break inside an answer must be replaced by a space"
            )
        rows.append(dict(zip(FIELDS, fields, strict=True)))
        numbers.append(number)
    return files.Rows(rows, path, numbers)


def pictures(task: str, records: Records, adjacent: bool) -> dict[str, files.Rows | list[Mapping[str, Any]]]:
    """Image → its two records.

    Args:
        task: for messages.
        records: with `image`.
        adjacent: whether the two must be neighbours (the first and second, third and fourth, … record).

    Raises:
        DataError: an image without exactly two records, or neighbours about different pictures.
    """
    found: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        image = record.get("image")
        if not isinstance(image, str) or not image:
            raise DataError(f"MME task {task}: {place(records, index, 'record')}: 'image' is missing or not a text")
        found.setdefault(image, []).append(index)
    for image, indices in found.items():
        if len(indices) != 2:
            where = place(records, indices[-1], "record")
            raise DataError(
                f"MME task {task}: {where}: picture {image} has {len(indices)} questions instead of two; "
                "correct the file, or check that it is complete and not doubled"
            )
        first, second = indices
        if adjacent and (first % 2 or second != first + 1):
            raise DataError(
                f"MME task {task}: {place(records, first, 'record')} and {place(records, second, 'record')}: the two "
                f"lines about {image} do not form a pair, which the official scorer takes for granted; sort the file, "
                "or use another variant, which pairs lines by picture"
            )
    return {image: _part(records, indices) for image, indices in found.items()}


def _part(records: Records, indices: list[int]) -> files.Rows | list[Mapping[str, Any]]:
    chosen = [records[i] for i in indices]
    if isinstance(records, files.Rows):
        return files.Rows(map(dict, chosen), records.path, [records.lines[i] for i in indices], records.unit)
    return chosen
