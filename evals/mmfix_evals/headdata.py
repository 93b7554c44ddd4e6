"""What heads are measured on: pictures, questions and needles of TinyWorld's dev split, or the user's own pictures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfix_evals import files
from mmfix_evals.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SPLIT = "dev"
PROMPT = "Please describe this image in detail."
NEEDLE = "the blue kite was hidden behind the third door of the old station."
REPEAT = "Repeat this sentence word by word: {needle}"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Asked:
    """One picture and prompt.

    Args:
        picture: RGB.
        prompt: the text beside it.
        answer: the right answer, where there is one.
        boxes: object → its boxes ``(x, y, w, h)`` in pixels, where the picture's contents are known.
    """

    picture: Image
    prompt: str
    answer: str = ""
    boxes: dict[str, list[tuple[int, int, int, int]]] = field(default_factory=dict)


def described(folder: Path | None, limit: int, prompt: str = PROMPT) -> list[Asked]:
    """Pictures with one prompt: TinyWorld's dev split, or those of a folder."""
    if folder is not None:
        return [Asked(picture, prompt) for picture in _folder(folder, limit)]
    from mmfix_evals import tinyworld

    found = []
    for item in tinyworld.scenes(SPLIT, limit):
        boxes: dict[str, list[tuple[int, int, int, int]]] = {}
        for placed in item.objects:
            boxes.setdefault(placed.category, []).append(placed.box)
        found.append(Asked(tinyworld.render(item), prompt, "", boxes))
    return found


def questions(folder: Path | None, file: Path | None, limit: int) -> list[Asked]:
    """Yes-or-no questions with answers: those of TinyWorld's dev split, or a POPE file about the pictures of a folder.

    Raises:
        DataError: pictures without questions, or questions that cannot be read.
    """
    if (folder is None) != (file is None):
        raise DataError(
            "--images and --questions go together: the right answers to questions about the pictures must be known "
            '(one JSON object per line: {"image": …, "text": …, "label": "yes" or "no"})'
        )
    if folder is not None and file is not None:
        return _own_questions(folder, file, limit)
    from mmfix_evals import tinyworld

    pictures = max(4, -(-limit // 18))
    asked = tinyworld.pope_questions(SPLIT, pictures)
    rows = [row for group in zip(*asked.values(), strict=True) for row in group][:limit]
    shown = {
        name: tinyworld.render(tinyworld.scene(*tinyworld.image_index(name))) for name in {r["image"] for r in rows}
    }
    return [Asked(shown[row["image"]], row["text"], row["label"]) for row in rows]


Pair = tuple[list["Image"], str, str]  # two pictures in order, a question, and its answer


def pair_questions(folder: Path, file: Path, limit: int) -> list[Pair]:
    """Yes-or-no questions about two pictures of a folder, each asked twice: in the order given, then exchanged.

    Args:
        file: JSON Lines of ``{"images": [first, second], "text": …, "label": "yes" or "no"}``.
        limit: pictures shown, two per question.

    Raises:
        DataError: a question that cannot be used, or none.
    """
    from mmfix_decoding import load_image

    rows = files.read_rows(file)
    found: list[Pair] = []
    for index, row in enumerate(rows[: limit // 2]):
        names, text, label = row.get("images"), row.get("text"), str(row.get("label", "")).strip().lower()
        two = isinstance(names, list) and len(names) == 2 and all(isinstance(name, str) and name for name in names)
        if not two or not isinstance(text, str) or not text.strip() or label not in ("yes", "no"):
            raise DataError(
                f"{rows.place(index)}: needs images (two file names), text, and label yes or no; correct that line"
            )
        pictures = [load_image(_inside(folder, name, rows.place(index))) for name in names]
        found += [(pictures, text, label), (pictures[::-1], text, label)]
    if not found:
        raise DataError(f"{file}: holds no question, or --limit is below two pictures; give more")
    return found


def digest(asked: Sequence[Asked]) -> str:
    """Hash of decoded pictures, prompts and answers, in order."""
    total = hashlib.sha256()
    for one in asked:
        total.update(f"{one.picture.mode} {one.picture.size} ".encode() + one.picture.tobytes())
        total.update(f"\0{one.prompt}\0{one.answer}\0".encode())
    return total.hexdigest()


def batches(decoder: Any, asked: Sequence[Asked], size: int) -> Iterator[tuple[dict[str, Any], Sequence[Asked]]]:
    """Processor outputs, as the decoder itself makes them, and what each row asks."""
    from mmfix_decoding import prompts

    for first in range(0, len(asked), size):
        part = asked[first : first + size]
        requests, _ = prompts.pair([one.picture for one in part], [one.prompt for one in part])
        yield prompts.encode(prompts.load_images(requests), decoder.processor, decoder.model), part


def beginnings(tokenizer: Any, answer: str) -> tuple[int, ...]:
    """Ids with which an answer may begin: in small letters and with a capital, with a space before it or not."""
    words = {answer.lower(), answer.capitalize()}
    forms = [form for word in sorted(words) for form in (word, f" {word}")]
    unknown = getattr(tokenizer, "unk_token_id", None)
    found = set()
    for form in forms:
        ids = [n for n in tokenizer(form, add_special_tokens=False)["input_ids"] if n != unknown]
        whole = tokenizer.decode(ids[:1]).strip()
        if ids and whole and answer.lower().startswith(whole.lower()):
            found.add(int(ids[0]))
    if not found:
        raise DataError(f"the tokenizer has no token with which {answer!r} begins; give questions with other answers")
    return tuple(sorted(found))


def find(ids: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where a run of token ids begins, or None."""
    size = len(wanted)
    return next((n for n in range(len(ids) - size + 1) if list(ids[n : n + size]) == list(wanted)), None)


def named(pieces: Sequence[str], names: Sequence[str]) -> list[tuple[int, str]]:
    """(step, name) for each time an answer names one of `names`: the step of the token in which the name begins.

    Args:
        pieces: the text that each token adds.
    """
    text, starts = "", []
    for piece in pieces:
        starts.append(len(text))
        text += piece
    found = []
    for name in names:
        for match in re.finditer(rf"\b{re.escape(name)}(?:s|es)?\b", text.lower()):
            step = max(n for n, start in enumerate(starts) if start <= match.start())
            found.append((step, name))
    return sorted(found)


def _folder(folder: Path, limit: int) -> list[Image]:
    from mmfix_decoding import load_image

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give --images a folder of pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{folder}: holds no picture ({', '.join(SUFFIXES)}); give another folder")
    return [load_image(path) for path in paths[:limit]]


def _own_questions(folder: Path, file: Path, limit: int) -> list[Asked]:
    from mmfix_decoding import load_image

    rows = files.read_rows(file)
    found = []
    for index, row in enumerate(rows[:limit]):
        values = [row.get(name) for name in ("image", "text", "label")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise DataError(f"{rows.place(index)}: needs image, text and label as text; correct that line")
        path = _inside(folder, str(values[0]), rows.place(index))
        found.append(Asked(load_image(path), str(values[1]), str(values[2]).strip().lower()))
    if not found:
        raise DataError(f"{file}: holds no question; give another file")
    return found


def _inside(folder: Path, name: str, place: str) -> Path:
    """A picture of a folder, and of no other."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{place}: the picture {name!r} lies outside {folder}; correct that line")
    return path
