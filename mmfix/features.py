"""What an image encoder returned, for several looks at the same pictures at once.

``get_image_features`` returns features per picture (or per prompt) in ``pooler_output``, and for models that feed the
tower's middle layers to the language model (Qwen3-VL) again per level in ``deepstack_features``. The features of all
looks are laid side by side in the last axis, which survives whatever ``generate()`` does to the list of pictures
(beams, several sequences), and are taken apart when the rows of the batch are expanded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfix.errors import UnsupportedModel

Parts = list[Tensor]  # features of each picture, [..., hidden]


def pack(outputs: Sequence[Any]) -> Any:
    """One output whose features hold those of all `outputs`, [..., looks * hidden]; the first one is changed."""
    first = outputs[0]
    for name, levels in _levels(first).items():
        packed = []
        for n, level in enumerate(levels):
            looks = [_levels(output)[name][n] for output in outputs]
            packed.append(_like(level, [torch.cat(parts, dim=-1) for parts in zip(*looks, strict=True)]))
        _set(first, name, packed)
    return first


def take_apart(
    output: Any,
    image: Tensor,
    looks: int,
    rows: Sequence[int | None],
    kept: Tensor | None = None,
    blank: Tensor | None = None,
) -> Any:
    """The features of expanded rows.

    Args:
        output: packed features of B prompts' pictures.
        image: Bool[B, T], image tokens of the prompts.
        looks: how many looks are packed.
        rows: for each row of a prompt, the look that it sees, or None for no picture.
        kept: Bool[B*R, T], the image tokens that stay in each row; None for all.
        blank: Bool[B*R, T], those whose features are zero; None for none.

    Returns:
        A copy with the features of each row ``b*R + r`` that sees a picture, in order.
    """
    found = copy.copy(output)
    counts = image.sum(-1).tolist()
    for name, levels in _levels(output).items():
        taken = []
        for level in levels:
            flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in level])
            if sum(counts) != flat.shape[0]:
                raise UnsupportedModel(
                    f"the prompts have {sum(counts)} image tokens and their pictures give {flat.shape[0]} features; "
                    "the processor and the model disagree"
                )
            parts = [part.chunk(looks, dim=-1) for part in torch.split(flat, counts)]
            wide = []
            for b, part in enumerate(parts):
                for r, look in enumerate(rows):
                    if look is None:
                        continue
                    row, own = part[look], b * len(rows) + r
                    row = row if blank is None else row.masked_fill(blank[own][image[b]][:, None], 0.0)
                    wide.append(row if kept is None else row[kept[own][image[b]]])
            taken.append(torch.cat(wide) if isinstance(level, Tensor) else wide)
        _set(found, name, taken)
    return found


def marked(output: Any, image: Tensor, looks: int, look: int) -> Tensor:
    """Bool[B, T]: image tokens of B prompts that are marked in a look which holds marks instead of features.

    A mark is 1 in every place of the token, and 0 where there is none. What the model puts between patches by itself is
    neither.

    Args:
        output: packed features of the prompts' pictures; image: Bool[B, T]; looks: how many are packed.
    """
    flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in output.pooler_output])
    marks = flat.chunk(looks, dim=-1)[look]
    chosen = (marks > 0.5).all(-1) & (marks < 1.5).all(-1)
    return torch.zeros_like(image).masked_scatter(image, chosen.to(image.device))


def parted(output: Any, image: Tensor, stop: int) -> tuple[Any, Any]:
    """Features of the image tokens before position `stop`, and of those from it on.

    Args:
        output: features of B prompts' pictures, not packed.
        image: Bool[B, T], image tokens of the prompts.
    """
    first, rest = copy.copy(output), copy.copy(output)
    before = (image & (torch.arange(image.shape[1], device=image.device) < stop))[image]
    for name, levels in _levels(output).items():
        flats = [torch.cat([part.reshape(-1, part.shape[-1]) for part in level]) for level in levels]
        for found, chosen in ((first, before), (rest, ~before)):
            taken = [flat[chosen.to(flat.device)] for flat in flats]
            _set(found, name, [t if isinstance(lv, Tensor) else [t] for t, lv in zip(taken, levels, strict=True)])
    return first, rest


def _levels(output: Any) -> dict[str, list[Any]]:
    """The fields that hold features, each as a list of levels; a level is a list or tensor of pictures."""
    found = {"pooler_output": [output.pooler_output]}
    deep = getattr(output, "deepstack_features", None)
    if deep:
        if not all(isinstance(part, Tensor) for level in deep for part in level):
            raise UnsupportedModel(
                f"{type(output).__name__}.deepstack_features is not a list of tensors per level, so image features "
                "cannot be given to branches; use a method without branches"
            )
        found["deepstack_features"] = list(deep)
    return found


def _set(output: Any, name: str, levels: list[Any]) -> None:
    setattr(output, name, levels[0] if name == "pooler_output" else levels)


def _like(level: Any, parts: Parts) -> Any:
    return torch.stack(parts) if isinstance(level, Tensor) else parts
