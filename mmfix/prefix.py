"""The start of a prompt that no branch changes: computed once, its keys and values stored once.

The keys and values of a token depend on a branch only if some query row at or before it, upstream, was changed. So the
tokens before the first changed row are one prefix for all branches: edits of question rows share the system text and
the image, another look at the picture shares the text before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmfix.branches import Branch
from mmfix.selection import Overlooked
from mmfix.spans import NEVER, TokenSpans
from mmfix_kernels import HeadScale, Rows

LEAST = 16  # tokens below which a pass of its own for the prefix costs more than it saves


def shared_length(branches: tuple[Branch, ...], spans: TokenSpans) -> int:
    """Tokens at the start of a batch of prompts that every branch leaves as they are."""
    length = spans.length
    for branch in branches:
        if branch.rewrites or isinstance(branch.select, Overlooked):
            return 0
        if branch.sees_otherwise:
            positions = torch.arange(spans.length, device=spans.image.device)
            length = min(length, int(torch.where(spans.image, positions, spans.length).min()))
        for edit in branch.edits:
            if isinstance(edit, HeadScale) or edit.rows is Rows.ALL:
                return 0
            starts = spans.starts[edit.rows]
            length = min(length, int(torch.where(starts < NEVER, starts, spans.length).min()))
    return length


def shareable(cache: Any) -> bool:
    """Whether the layers of a cache can be replaced by layers that share a prefix."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


class SharedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer: a prefix once per prompt, and what follows it once per row.

    Args:
        layer: the layer after the prefix's pass; [B, H_kv, P, D].
        count: rows per prompt.
    """

    def __init__(self, layer: DynamicLayer, count: int) -> None:
        super().__init__()
        self.prefix_keys, self.prefix_values = layer.keys, layer.values
        self.count = count
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.length = 0  # tokens after the prefix
        self._room: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True
        self._view()

    @property
    def shared(self) -> int:
        """Tokens of the prefix."""
        return int(self.prefix_keys.shape[2])

    def _view(self) -> None:
        if self._room is None:
            self.keys = self.values = torch.empty(0, dtype=self.dtype, device=self.device)
        else:
            self.keys, self.values = (room[:, :, : self.length] for room in self._room)

    def _grown(self, old: Tensor | None, new: Tensor, width: int) -> Tensor:
        room = new.new_empty(new.shape[0], new.shape[1], width, new.shape[3])
        if old is not None:
            room[:, :, : self.length] = old[:, :, : self.length]
        return room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B*R, H_kv, L, D]; returns what follows the prefix."""
        stop = self.length + key_states.shape[2]
        old = self._room
        if old is None or old[0].shape[2] < stop:
            width = stop + max(64, stop // 2)
            before = (None, None) if old is None else old
            self._room = (self._grown(before[0], key_states, width), self._grown(before[1], value_states, width))
        assert self._room is not None
        self._room[0][:, :, self.length : stop] = key_states
        self._room[1][:, :, self.length : stop] = value_states
        self.length = stop
        self._view()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.shared + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.shared + self.length + int(query_length), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end (a negative number), never those of the prefix."""
        if tokens_to_remove > 0:  # the older meaning: the length to keep
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        if -tokens_to_remove > self.length:
            raise ValueError(f"{-tokens_to_remove} tokens cannot be removed: {self.length} follow the shared prefix")
        self.length += tokens_to_remove
        self._view()

    def _select(self, rows: Tensor) -> None:
        prompts = rows.to(self.device)[:: self.count] // self.count
        if not torch.equal(prompts, torch.arange(self.prefix_keys.shape[0], device=self.device)):
            self.prefix_keys = self.prefix_keys.index_select(0, prompts)
            self.prefix_values = self.prefix_values.index_select(0, prompts)
        if self._room is not None:
            chosen = rows.to(self.device)
            self._room = (self._room[0].index_select(0, chosen), self._room[1].index_select(0, chosen))
        self._view()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def plain(self) -> DynamicLayer:
        """An ordinary layer with the prefix repeated for every row."""
        layer = DynamicLayer()
        keys, values = (x.repeat_interleave(self.count, dim=0) for x in (self.prefix_keys, self.prefix_values))
        layer.update(keys, values)
        if self.length:
            layer.update(self.keys, self.values)
        return layer


def share(cache: Any, count: int) -> None:
    """Make the tokens that a cache holds the prefix of `count` rows per prompt."""
    cache.layers = [SharedLayer(layer, count) for layer in cache.layers]


def unshare(cache: Any) -> None:
    """Turn shared layers into ordinary ones, for whoever goes on with the cache."""
    cache.layers = [layer.plain() if isinstance(layer, SharedLayer) else layer for layer in cache.layers]
