"""Head maps of a loaded model: one score per layer and head, from TinyWorld's dev split or the user's pictures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfix import describe, headscores, retrieval
from mmfix.heads import HeadMap
from mmfix.methods import VSEAM
from mmfix_decoding import grids
from mmfix_evals import headdata
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.fingerprint import fingerprint
from mmfix_evals.headdata import Asked

SCORES = {
    "vhd": "vision-aware head divergence, || A(image, text) - A(text) || at the last position (arXiv:2412.13949)",
    "image-mass": "attention on the picture at the last position",
    "retrieval": "share of words said while the head looks most at their source (arXiv:2404.15574)",
    "vseam": "probability that the right answer loses when the head is averaged away (arXiv:2509.14837)",
}
NEEDLES = ("object", "text")
RECALL = 0.5  # below it an answer does not count as a repetition of its needle, as in the paper


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Args:
        score: one of ``SCORES``.
        images: folder of pictures; None takes TinyWorld's dev split.
        questions: POPE file about them, for ``vseam``.
        limit: pictures (``vseam``: questions) at most.
        prompt: beside every picture.
        needle: of ``retrieval``: "object" looks for the named object's patches, "text" for a sentence to repeat;
            None takes "object" where the pictures' contents are known.
        text: the sentence.
        steps: tokens decoded for ``retrieval``.
        batch_size: prompts at once.
    """

    score: str
    images: Path | None = None
    questions: Path | None = None
    limit: int = 32
    prompt: str = headdata.PROMPT
    needle: str | None = None
    text: str = headdata.NEEDLE
    steps: int = 48
    batch_size: int = 8


Progress = Callable[[int], None]


def total(wanted: Wanted, model: Any) -> int:
    """How many times ``progress`` will be told of one piece of work, at most."""
    family = describe(model)
    return family.num_layers * family.num_heads if wanted.score == "vseam" else wanted.limit


def measure(decoder: Any, wanted: Wanted, progress: Progress = lambda done: None) -> HeadMap:
    """Measure one map; the decoder is held meanwhile.

    Raises:
        UsageError: an unknown score.
        DataError: nothing to measure on.
    """
    makers = {"vhd": _looks, "image-mass": _looks, "retrieval": _retrieval, "vseam": _vseam}
    if wanted.score not in makers:
        raise UsageError(f"--score {wanted.score!r}: choose one of {', '.join(SCORES)}")
    with decoder.exclusive():
        values, asked, settings, also = makers[wanted.score](decoder, wanted, progress)
    known = fingerprint(decoder)
    data = "TinyWorld dev" if wanted.images is None else "own pictures"
    return HeadMap(
        score=wanted.score,
        model=str(known["id"]),
        revision=known["revision"] or known["sha256"],
        data_sha256=headdata.digest(asked),
        prompts=len(asked),
        values=tuple(tuple(round(v, 8) for v in row) for row in values.tolist()),
        settings={"data": data, **settings},
        also=also,
    )


Made = tuple[Tensor, Sequence[Asked], dict[str, Any], dict[str, Any]]


def _looks(decoder: Any, wanted: Wanted, progress: Progress) -> Made:
    asked = headdata.described(wanted.images, wanted.limit, wanted.prompt)
    inputs = (one for one, _ in headdata.batches(decoder, asked, wanted.batch_size))
    found = headscores.mean_looks(decoder.model, inputs, progress)
    totals = found["t-vhd"]
    also = {"t_vhd": {"k": headscores.T_VHD_HEADS, "mean": round(sum(totals) / len(totals), 6)}}
    return found[wanted.score], asked, {"prompt": wanted.prompt}, also if wanted.score == "vhd" else {}


def _vseam(decoder: Any, wanted: Wanted, progress: Progress) -> Made:
    asked = headdata.questions(wanted.images, wanted.questions, wanted.limit)
    known = {
        answer: headdata.beginnings(decoder.processor.tokenizer, answer) for answer in {one.answer for one in asked}
    }
    made = [
        (inputs, [known[one.answer] for one in part])
        for inputs, part in headdata.batches(decoder, asked, wanted.batch_size)
    ]
    values, plain = headscores.importance(decoder.model, made, progress)
    return values, asked, {"answer": "first token"}, {"p_right": round(plain, 6), "gain": _gain(values)}


def _gain(values: Tensor) -> dict[str, float]:
    """By how much the method that takes this map scales a head at most; strength 1 may be nearly the plain model."""
    named = tuple((n, h, value) for n, row in enumerate(values.tolist()) for h, value in enumerate(row))
    modulation = VSEAM(heads=named)
    return {"strength": modulation.strength, "largest": round(modulation.largest, 8)}


def _retrieval(decoder: Any, wanted: Wanted, progress: Progress) -> Made:
    needle = wanted.needle or ("object" if wanted.images is None else "text")
    if needle not in NEEDLES:
        raise UsageError(f"--needle {needle!r}: choose one of {', '.join(NEEDLES)}")
    if needle == "object" and wanted.images is not None:
        raise UsageError("--needle object: where objects lie is known of TinyWorld's pictures only; use --needle text")
    return (_objects if needle == "object" else _sentences)(decoder, wanted, progress)


def _sentences(decoder: Any, wanted: Wanted, progress: Progress) -> Made:
    prompt = headdata.REPEAT.format(needle=wanted.text)
    asked = headdata.described(wanted.images, wanted.limit, prompt)
    tokenizer = decoder.processor.tokenizer
    ends = _ends(decoder)
    kept: list[Tensor] = []
    for inputs, part in headdata.batches(decoder, asked, wanted.batch_size):
        needle = torch.stack([_sentence(tokenizer, row, wanted.text) for row in inputs["input_ids"]])
        found = retrieval.decode(decoder.model, inputs, needle.to(inputs["input_ids"].device), wanted.steps, ends)
        scores, recall = retrieval.copied(found, inputs["input_ids"], needle, ends)
        kept += [score for score, share in zip(scores, recall.tolist(), strict=True) if share > RECALL]
        progress(len(part))
    if not kept:
        raise DataError(
            f"none of {len(asked)} answers repeats half of its needle: this model does not copy text, so no head can "
            "be seen copying; use --needle object on TinyWorld, or another --text"
        )
    settings = {"needle": "text", "text": wanted.text}
    return torch.stack(kept).mean(0), asked, settings, {"runs": len(kept)}


def _sentence(tokenizer: Any, ids: Tensor, text: str) -> Tensor:
    """Bool[T]: the tokens of a sentence in a prompt, however the words before it are joined to it."""
    listed = ids.tolist()
    for form in (text, f" {text}"):
        wanted = tokenizer(form, add_special_tokens=False)["input_ids"]
        for lost in (0, 1):  # the first and last token may be joined to their neighbours
            inner = wanted[lost : len(wanted) - lost]
            start = headdata.find(listed, inner) if inner else None
            if start is not None:
                places = torch.zeros(len(listed), dtype=torch.bool)
                places[start : start + len(inner)] = True
                return places
    raise DataError(f"the sentence {text!r} is not found among the prompt's tokens; choose another --text")


def _objects(decoder: Any, wanted: Wanted, progress: Progress) -> Made:
    asked = headdata.described(None, wanted.limit, wanted.prompt)
    tokenizer, ends = decoder.processor.tokenizer, _ends(decoder)
    hits, mass, count = torch.zeros(()), torch.zeros(()), 0
    for inputs, part in headdata.batches(decoder, asked, wanted.batch_size):
        image = inputs["input_ids"] == describe(decoder.model).image_token_id
        found = retrieval.decode(decoder.model, inputs, image, wanted.steps, ends)
        targets = []
        for row, one in enumerate(part):
            ids = [token for token in found.tokens[row].tolist() if token not in ends]
            pieces = _pieces(tokenizer, ids)
            patches = _patches(decoder, inputs, one, image[row].cpu())
            targets.append([(step, patches[name]) for step, name in headdata.named(pieces, list(one.boxes))])
        scores, named = retrieval.placed(found, targets)
        hits, count = hits + scores * named, count + named
        mass = mass + found.mass.sum((0, 2)).cpu() / max(1, found.mass.shape[0])
        progress(len(part))
    if not count:
        raise DataError(
            f"no answer of {len(asked)} names an object of its picture; give another --prompt or more --limit"
        )
    also = {"named": count, "image_mass": [[round(v, 6) for v in row] for row in (mass / len(asked)).tolist()]}
    return hits / count, asked, {"needle": "object", "prompt": wanted.prompt}, also


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to an answer."""
    texts = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]


def _patches(decoder: Any, inputs: dict[str, Tensor], one: Asked, image: Tensor) -> dict[str, Tensor]:
    """Object → Bool[T], the image tokens whose patch its boxes touch."""
    known = decoder.image_grids(one.picture, one.prompt)
    if not known:
        raise DataError("the patch layout of this model is not known, so objects cannot be found; use --needle text")
    positions = image.nonzero()[:, 0]
    width, height = one.picture.size
    found = {}
    for name, boxes in one.boxes.items():
        places = torch.zeros(len(image), dtype=torch.bool)
        for grid in known:
            touched = np.zeros((grid.rows, grid.columns), dtype=bool)
            for box in boxes:
                touched |= _touched(grid, box, width, height)
            for row, column in np.argwhere(touched):
                places[positions[grid.start + row * (grid.columns + grid.skip) + column]] = True
        found[name] = places
    return found


def _touched(grid: grids.PatchGrid, box: tuple[int, int, int, int], width: int, height: int) -> np.ndarray[Any, Any]:
    """Bool[rows, columns]: cells of which a box covers some part."""
    left, top, right, bottom = grid.box
    x, y, w, h = box
    across = np.linspace(left, right, grid.columns + 1) * width
    down = np.linspace(top, bottom, grid.rows + 1) * height
    columns = (across[1:] > x) & (across[:-1] < x + w)
    rows = (down[1:] > y) & (down[:-1] < y + h)
    return rows[:, None] & columns[None, :]


def _ends(decoder: Any) -> tuple[int, ...]:
    """Ids that end an answer, and padding."""
    config = decoder.model.generation_config
    given = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    found = [*given, decoder.processor.tokenizer.eos_token_id, config.pad_token_id]
    return tuple(dict.fromkeys(int(n) for n in found if n is not None))
