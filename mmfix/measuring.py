"""A plain pass over a prompt, ahead of its own, that notes where its last row looks in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfix.prefix import part
from mmfix.spans import padding_mask
from mmfix_kernels import AttentionCall, grouped_attention, row_weights

if TYPE_CHECKING:
    from mmfix.families import Family
    from mmfix.inputs import Inputs
    from mmfix.session import Session


def ahead(session: Session, given: Inputs, kwargs: dict[str, Any], length: int) -> dict[str, Any]:
    """Give the session's branches the maps of a plain pass over the prompt; returns the inputs, pictures encoded."""
    expander = session.expander
    assert expander is not None
    if kwargs.get("pixel_values") is not None:
        kwargs = expander.vision.encode(kwargs)
    valid = padding_mask(kwargs.get("attention_mask"), given.like[:, :length])
    last = torch.where(valid, torch.arange(length, device=valid.device), 0).amax(-1)
    alone = kwargs if length == given.length else part(kwargs, slice(0, length), slice(0, length))
    session.measuring = Measuring(session.family, last, session.backend)
    try:
        expander.maps = session.measuring.run(alone)
    finally:
        session.measuring = None
    session.extra_passes += 1
    return kwargs


class Measuring:
    """One such pass; while it runs, the language model's attention calls come here.

    Args:
        last: Int64[B], the last token of each prompt.
    """

    def __init__(self, family: Family, last: Tensor, backend: str | None) -> None:
        self.family, self.last, self.backend = family, last, backend
        self._maps: list[Tensor] = []

    def run(self, kwargs: dict[str, Any]) -> Tensor:
        """Float32[B, layers, T]: weights of the last row of each prompt, mean over heads.

        Args:
            kwargs: inputs of the model's forward pass for the prompts, without branches.
        """
        alone = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "output_attentions")}
        self.family.model.forward(**{**alone, "use_cache": False, "logits_to_keep": 1})
        return torch.stack(self._maps, dim=1)

    def attend(self, inputs: dict[str, Any]) -> tuple[Tensor, None]:
        """One attention call, as the model means it."""
        call = AttentionCall(**inputs)
        self._maps.append(row_weights(call, self.last[:, None])[:, :, 0].mean(1))
        return grouped_attention(call, self.backend).output.transpose(1, 2).contiguous(), None
