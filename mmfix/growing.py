"""A cache whose keys and values are written in place: a search tries tokens and takes them back at every step.

transformers' own layer copies all keys for every token that is added; here a layer has room for some more, and taking
tokens back only forgets how far it was filled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 16  # tokens that are made room for at a time


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys [rows, heads, n, width] that are the filled start of a wider tensor."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """The same keys and values, able to grow."""
        found = cls.__new__(cls)
        found.__dict__.update(layer.__dict__)
        found._room = {}
        return found

    def __copy__(self) -> GrowingLayer:
        return self.of(self)  # what it grows into is its own

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [rows, heads, m, width]; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._longer("keys", self.keys, key_states)
        self.values = self._longer("values", self.values, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow `beam_idx`, with the room behind their keys."""
        for name in ("keys", "values"):
            filled, room = getattr(self, name), self._behind(name)
            source = filled if room is None else room
            moved = source.index_select(0, beam_idx.to(source.device))
            if room is not None:
                self._room[name] = moved
            setattr(self, name, moved[..., : filled.shape[-2], :])

    def _behind(self, name: str) -> Tensor | None:
        """The wider tensor of which the keys (or values) are the start; None where they are no longer."""
        room, filled = self.__dict__.setdefault("_room", {}).get(name), getattr(self, name)
        same = room is not None and room.data_ptr() == filled.data_ptr() and len(room) == len(filled)
        return room if same else None

    def _longer(self, name: str, filled: Tensor, new: Tensor) -> Tensor:
        if not filled.numel():
            return new
        known, length = filled.shape[-2], filled.shape[-2] + new.shape[-2]
        room = self._behind(name)
        if room is None or room.shape[-2] < length or new.requires_grad:
            room = filled.new_empty(*filled.shape[:-2], length + ROOM, filled.shape[-1])
            room[..., :known, :] = filled
            self._room[name] = room
        room[..., known:length, :] = new
        return room[..., :length, :]
