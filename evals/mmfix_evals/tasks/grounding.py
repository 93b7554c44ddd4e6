"""Grounding: for each object that a caption names rightly, how much of the image attention lies on it.

Attention is recorded while the caption is generated, with the method in force (:mod:`mmfix.recording`), so that one
sees whether a method moves attention to the object. Recording is slow: the speeds of these tasks mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mmfix_evals import stats
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics import chair
from mmfix_evals.metrics.grounding import cover_of, ground
from mmfix_evals.tasks.base import Counts, Document, Metric, Task

if TYPE_CHECKING:
    pass

COLUMNS = ("captions", "objects", "share", "area", "hits", "hit_chance", "image_mass")


def _mean(name: str) -> Any:
    above, below = COLUMNS.index(name), COLUMNS.index("objects")

    def formula(c: Counts) -> Counts:
        return stats.ratio(c[..., above], c[..., below])

    return formula


def _lift(c: Counts) -> Counts:
    return stats.ratio(c[..., COLUMNS.index("share")], c[..., COLUMNS.index("area")])


@dataclass
class Recorded:
    """One caption with what was measured of its objects."""

    text: str
    token_ids: list[int]
    finish_reason: str
    report: dict[str, Any] | None
    objects: list[dict[str, Any]] = field(default_factory=list)


class GroundingTask(Task):
    """Means over rightly named objects, each at its first mention.

    ``attention_share``: share of the image attention inside the object's mask while its name is generated;
    ``area_share`` is what evenly spread attention would give, ``lift`` their ratio. ``pointing``: how often the patch
    with most attention touches the mask, beside ``pointing_chance``. ``image_mass``: attention on the image at all.
    """

    columns = COLUMNS
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("attention_share", _mean("share"), headline=True),
        Metric("area_share", _mean("area"), better=None),
        Metric("lift", _lift, percent=False, headline=True),
        Metric("pointing", _mean("hits"), headline=True),
        Metric("pointing_chance", _mean("hit_chance"), better=None),
        Metric("image_mass", _mean("image_mass"), better=None),
        Metric("objects", lambda c: c[..., 1], percent=False, integer=True, headline=True, better=None),
    )
    splits = ()
    flavours = (chair.FLAVOUR,)
    flavour_field = "flavour"
    unit = "captions"
    max_new_tokens = 128

    def masks(self, document: Document) -> Mapping[str, NDArray[np.bool_]]:
        """CHAIR node → Bool[H, W], every object of that kind in the picture."""
        raise NotImplementedError

    def generate(
        self, decoder: Any, documents: Sequence[Document], shown: Sequence[Any], **arguments: Any
    ) -> list[Any]:
        import torch

        import mmfix
        from mmfix_decoding import options
        from mmfix_decoding.answer import cut
        from mmfix_evals.tasks.attention import record_steps
        from mmfix_evals.tasks.dialogue import encode, render

        limit, seed, size = (arguments.pop(name, None) for name in ("max_new_tokens", "seed", "batch_size"))
        chosen = options.plan(decoder.model, decoder.processor, limit or self.max_new_tokens, seed, size, arguments)
        if chosen.sampling or (chosen.kwargs.get("num_beams") or 1) > 1:
            raise UsageError(f"{self.name} records attention of greedy decoding; leave do_sample and num_beams out")
        inputs = encode(decoder, [render(decoder.processor, [document.prompt], [], 0) for document in documents], shown)
        with torch.inference_mode(), mmfix.mitigate(decoder.model, decoder.method, telemetry=True) as fix:
            with record_steps(decoder.model, fix) as record:
                rows = decoder.model.generate(**inputs, **chosen.kwargs).tolist()
            report = fix.report().to_dict() if decoder.method is not None else None
        answers, width = [], inputs["input_ids"].shape[1]
        for place, (document, row) in enumerate(zip(documents, rows, strict=True)):
            ids, reason = cut(row[width:], chosen.stop_ids, chosen.pad_id, chosen.max_new_tokens)
            maps = [step[place, : record.image.shape[1]][record.image[place]].double() for step in record.steps]
            answer = Recorded("", ids, reason, report)
            answer.text, spans = _spans(decoder.processor.tokenizer, ids)
            answer.objects = self._measure(decoder.processor, document, answer.text, spans, maps, inputs, place)
            answers.append(answer)
        return answers

    def _measure(
        self, processor: Any, document: Document, text: str, spans: Any, maps: Any, inputs: Any, place: int
    ) -> list[dict[str, Any]]:
        """One entry per rightly named object."""
        masks, found, seen = self.masks(document), [], set()
        for mention in chair.Chair().mentions(text):
            if mention.node not in masks or mention.node in seen:
                continue
            seen.add(mention.node)
            steps = [n for n, (start, end) in enumerate(spans) if start < mention.end and end > mention.start]
            if not steps:
                continue
            attention = sum(maps[n] for n in steps) / len(steps)
            grid = grid_of(len(attention), inputs, place, processor)
            cover = cover_of(seen_mask(processor, masks[mention.node]), grid)
            measured = ground(attention.reshape(grid).cpu().numpy(), cover)
            if measured is not None:
                found.append({"node": mention.node, **measured._asdict(), "image_mass": float(attention.sum())})
        return found

    def verdicts(self, document: Document, response: str) -> dict[str, Any]:
        raise UsageError(f"{self.name} is measured while the model generates; it cannot score texts alone")

    def record(self, document: Document, answer: Any) -> dict[str, Any]:
        return {"objects": answer.objects}

    def counts(self, sample: Mapping[str, Any], flavour: str) -> Mapping[str, float]:
        objects = sample["objects"]
        return {
            "captions": 1,
            "objects": len(objects),
            "share": sum(one["share"] for one in objects),
            "area": sum(one["area"] for one in objects),
            "hits": sum(one["hit"] for one in objects),
            "hit_chance": sum(one["hit_chance"] for one in objects),
            "image_mass": sum(one["image_mass"] for one in objects),
        }


def _spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of an answer, and where in it each token ends up."""
    ends = [len(tokenizer.decode(ids[: n + 1], skip_special_tokens=True)) for n in range(len(ids))]
    full = tokenizer.decode(ids, skip_special_tokens=True)
    cut = len(full) - len(full.lstrip())
    starts = [0, *ends[:-1]]
    return full.strip(), [(max(0, a - cut), max(0, b - cut)) for a, b in zip(starts, ends, strict=True)]


def grid_of(tokens: int, inputs: Mapping[str, Any], place: int, processor: Any) -> tuple[int, int]:
    """Rows and columns of a picture's image tokens, in reading order.

    Raises:
        DataError: the tokens are no single grid (several crops of a picture, line-break tokens, resampled queries).
    """
    if "image_grid_thw" in inputs:
        merge = int(getattr(processor.image_processor, "merge_size", 1))
        _, h, w = (int(n) for n in inputs["image_grid_thw"][place])
        grid = h // merge, w // merge
    else:
        side = round(tokens**0.5)
        grid = side, side
    if grid[0] * grid[1] != tokens:
        raise DataError(
            f"{tokens} image tokens are no {grid[0]} x {grid[1]} grid (several crops, or tokens that are not patches): "
            "grounding cannot be measured on this model"
        )
    return grid


def seen_mask(processor: Any, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mask as the model sees the picture: resized and cropped by the model's own image processor."""
    from PIL import Image

    picture = Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")
    pixels = processor.image_processor(images=[picture], do_normalize=False, do_rescale=False, return_tensors="np")[
        "pixel_values"
    ]
    pixels = np.asarray(pixels, dtype=np.float64)
    if pixels.ndim != 4 or pixels.shape[0] != 1:
        raise DataError(f"the image processor makes pixels of shape {list(pixels.shape)}: grounding needs one picture")
    found: NDArray[np.float64] = np.clip(pixels[0].mean(axis=0) / 255.0, 0.0, 1.0)
    return found
