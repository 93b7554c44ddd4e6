"""A plain pass over a prompt, ahead of its own, that notes where its last row looks in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfix_kernels import AttentionCall, grouped_attention, row_weights

if TYPE_CHECKING:
    from mmfix.families import Family


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
