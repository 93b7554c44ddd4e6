"""Several independent turns behind one picture in one sequence, and attention that knows it.

A sequence is a prefix (the picture) followed by `turns` blocks of `length` tokens. A token sees the prefix and the
earlier tokens of its own block. Computed as a dense map, most of the work would be on masked entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "tinyworld_turns"


@dataclass(frozen=True)
class Layout:
    """Shape of a training sequence: `prefix` tokens, then `turns` blocks of `length` tokens."""

    prefix: int
    turns: int
    length: int

    @property
    def total(self) -> int:
        return self.prefix + self.turns * self.length

    def positions(self, device: torch.device) -> Tensor:
        """Int64[1, total]: every block continues the positions of the prefix."""
        block = torch.arange(self.prefix, self.prefix + self.length, device=device)
        return torch.cat([torch.arange(self.prefix, device=device), block.repeat(self.turns)])[None]

    @contextmanager
    def attention(self, model: Any) -> Iterator[None]:
        """Let the language model attend by this layout."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
        ) -> tuple[Tensor, None]:
            return self._attend(query, key, value).transpose(1, 2).contiguous(), None

        decoder = model.get_decoder()
        before = decoder.config._attn_implementation_internal
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        decoder.config._attn_implementation_internal = NAME
        try:
            yield
        finally:
            decoder.config._attn_implementation_internal = before

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, total, D] each (no grouped heads)."""
        b, h, _, d = query.shape
        p, n, t = self.prefix, self.turns, self.length
        query = query * d**-0.5
        key_p, value_p = key[:, :, :p], value[:, :, :p]
        first = (query[:, :, :p] @ key_p.transpose(-1, -2) + _causal(p, query)).softmax(-1) @ value_p
        blocks = [x[:, :, p:].reshape(b, h, n, t, d) for x in (query, key, value)]
        to_prefix = (query[:, :, p:] @ key_p.transpose(-1, -2)).view(b, h, n, t, p)
        to_self = blocks[0] @ blocks[1].transpose(-1, -2) + _causal(t, query)
        weights = torch.cat([to_prefix, to_self], dim=-1).softmax(-1)
        out = (weights[..., :p].reshape(b, h, n * t, p) @ value_p).view(b, h, n, t, d) + weights[..., p:] @ blocks[2]
        return torch.cat([first, out.reshape(b, h, n * t, d)], dim=2)


def _causal(size: int, like: Tensor) -> Tensor:
    return torch.full((size, size), float("-inf"), dtype=like.dtype, device=like.device).triu(1)
