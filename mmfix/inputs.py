"""What a forward pass of the model is given, read once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmfix.errors import MmfixError


@dataclass(frozen=True, eq=False)
class Inputs:
    """Facts of one forward pass.

    Args:
        ids: Int64[B, L], or None.
        embeds: Float[B, L, hidden], or None.
        cache: the key/value cache, or None.
        past: keys in the cache before this pass.
        kept: how many positions' logits are asked for; 0 for all, or when they are picked by index.
        picture: what stands for the picture.
    """

    ids: Tensor | None
    embeds: Tensor | None
    cache: Any
    past: int
    kept: int
    picture: Any

    @staticmethod
    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """From the arguments of the model's ``forward``."""
        ids = kwargs.get("input_ids")
        if ids is None and args and isinstance(args[0], Tensor):
            ids = args[0]
        embeds = kwargs.get("inputs_embeds")
        if ids is None and embeds is None:
            raise MmfixError("the model was called with neither input_ids nor inputs_embeds; give one of them")
        keep = kwargs.get("logits_to_keep", 0)
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        encoded = kwargs.get("mm_encoder_outputs")
        picture = encoded if encoded is not None else kwargs.get("pixel_values")
        return Inputs(ids, embeds, cache, past, keep if isinstance(keep, int) else 0, picture)

    @property
    def like(self) -> Tensor:
        """A tensor with the shape [B, L, …] of the pass."""
        found = self.ids if self.ids is not None else self.embeds
        assert found is not None
        return found

    @property
    def length(self) -> int:
        return self.like.shape[1]


def rows_for(tensor: Tensor, batch: int) -> Tensor:
    """Rows repeated for a batch that grew by a whole factor after the prompt (beams)."""
    if batch % tensor.shape[0]:
        raise MmfixError(
            f"the prompt had {tensor.shape[0]} rows and this step has {batch}; start a new generate() call"
        )
    return tensor.repeat_interleave(batch // tensor.shape[0], dim=0)
