"""The inputs of a ``generate()`` call, from which those of one of its prompts with other pictures are made."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfix.errors import UnsupportedModel, UsageError
from mmfix.families import Family


@dataclass(frozen=True, eq=False)
class Call:
    """What a caller gave ``generate()`` for the model.

    Args:
        inputs: name → tensor of every prompt, or of every picture.
        pictures: for each prompt, the number of its picture; None where it has none.
    """

    inputs: dict[str, Tensor]
    pictures: tuple[int | None, ...]

    @staticmethod
    def read(args: tuple[Any, ...], kwargs: dict[str, Any], family: Family, owner: str) -> Call:
        """The call of a method, `owner`, that looks at one picture per prompt, part by part.

        Raises:
            UsageError: prompts that are not given as token ids.
            UnsupportedModel: pictures that cannot be cut out as they are, or that are more than one per prompt.
        """
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise UsageError(
                f"{owner} asks the model about parts of the picture; give generate() the prompts' input_ids"
            )
        known = inspect.signature(family.model.forward).parameters
        inputs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and name in known}
        inputs["input_ids"] = ids
        pixels = kwargs.get("pixel_values")
        if pixels is None:
            return Call(inputs, (None,) * len(ids))
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3:
            shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise UnsupportedModel(
                f"{family.name}: its pictures come as {shape}, packed or in tiles, of which {owner} cannot cut out a "
                "part; use a model with one picture [3, H, W] per image"
            )
        shown = (ids == family.image_token_id).any(-1)
        if len(pixels) != int(shown.sum()):
            raise UnsupportedModel(
                f"{family.name}: {len(pixels)} pictures for {int(shown.sum())} prompts with one, and {owner} must know "
                "which picture an answer is about; give one picture per prompt, whole"
            )
        numbers = (shown.cumsum(0) - 1).tolist()
        return Call(inputs, tuple(n if there else None for n, there in zip(numbers, shown.tolist(), strict=True)))

    def picture(self, prompt: int) -> Tensor | None:
        """Float[3, H, W] of a prompt."""
        number = self.pictures[prompt]
        return None if number is None else self.inputs["pixel_values"][number]

    def shown(self, prompt: int, pictures: Tensor) -> dict[str, Tensor]:
        """The inputs of one prompt, once for each of other pictures [N, 3, H, W]."""
        prompts, number = len(self.inputs["input_ids"]), self.pictures[prompt]
        rows: dict[str, Tensor] = {}
        for name, value in self.inputs.items():
            if value.ndim and len(value) == prompts:
                rows[name] = torch.stack([value[prompt]] * len(pictures))
            elif value.ndim and number is not None and len(value) == len(self.inputs["pixel_values"]):
                rows[name] = torch.stack([value[number]] * len(pictures))
            else:
                rows[name] = value
        return {**rows, "pixel_values": pictures}
