"""The start of a prompt that no branch changes: computed once, its keys and values stored once.

The keys and values of a token depend on a branch only if some query row at or before it, upstream, was changed. So the
tokens before the first changed row are one prefix for all branches: edits of question rows share the system text and
the image, another look at the picture shares the text before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmfix import features
from mmfix.branches import Branch
from mmfix.passes import Pass
from mmfix.selection import Overlooked
from mmfix.spans import NEVER, TokenSpans
from mmfix_kernels import HeadMean, HeadScale, Rows

if TYPE_CHECKING:
    from mmfix.inputs import Inputs
    from mmfix.session import Session

LEAST = 16  # tokens below which a pass of its own for the prefix costs more than it saves
_PICTURE = ("pixel_values", "mm_encoder_outputs")
_TOKENS = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids")


def worthwhile(session: Session, given: Inputs, kwargs: dict[str, Any]) -> bool:
    """Whether a prompt may start with a pass of its own.

    Not where a method looks at the whole prompt (sinks, heads, masks), and not where the cache or the inputs are not
    those of ``generate()``.
    """
    if session.branching is None or session.branching.rewrite is not None:
        return False
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    plain = (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)) and positions is not None
    usual = given.kept and given.ids is not None and not kwargs.get("output_hidden_states")
    # Cross-attention keys and first tokens that attend to what follows them have no prefix.
    family = not session.family.cross_layers and not session.family.bidirectional
    return bool(plain and usual and family and not session.whole and shareable(given.cache))


def compute(session: Session, given: Inputs, kwargs: dict[str, Any], length: int) -> tuple[int, dict[str, Any]]:
    """Compute the start of a prompt that no branch changes, once per prompt.

    Returns its length, 0 for none, and the inputs with the features of the pictures that come after it.
    """
    expander = session.expander
    assert expander is not None
    session.expanding = False
    try:
        session.current = Pass(True, 0, length, length)
        session.read_prompt(given, kwargs, False)
        spans = session.spans
        assert spans is not None
        shared = min(shared_length(expander.rows.branches, spans), length - 1)
        image = spans.image
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        inside = bool(image[:, :shared].any()), bool(image[:, shared:].any())
        if all(inside) and encoded is None:  # pixels cannot be given to two passes
            shared, inside = int(image.any(0).int().argmax()), (False, True)
        session.prompts -= given.like.shape[0]
        if shared < LEAST:
            return 0, kwargs
        session.current = Pass(True, 0, shared, shared)
        session.read_rows(given.like.shape[0], shared)
        session.active = True
        inputs = part({**kwargs, "input_ids": given.ids}, slice(0, shared), slice(0, shared))
        if not inside[0]:
            inputs = _without_picture(inputs)
        elif not inside[1]:
            kwargs = _without_picture(kwargs)
        else:
            first, rest = features.parted(encoded, image, shared)
            inputs["mm_encoder_outputs"] = {**inputs["mm_encoder_outputs"], "image": first}
            kwargs = {**kwargs, "mm_encoder_outputs": {**kwargs["mm_encoder_outputs"], "image": rest}}
        session.family.model.forward(**{**inputs, "logits_to_keep": 1})
    finally:
        session.expanding, session.active = True, False
        session.mass_sum, session.mass_layers = None, 0
    session.share(given.cache, expander.rows.count)
    return shared, kwargs


def part(kwargs: dict[str, Any], tokens: slice, mask: slice) -> dict[str, Any]:
    """Inputs of some of the tokens, with the attention mask of `mask`."""
    known = {name: value for name, value in kwargs.items() if value is not None}
    cut = {name: value[..., tokens] if name in _TOKENS else value for name, value in known.items()}
    if cut.get("attention_mask") is not None:
        cut["attention_mask"] = cut["attention_mask"][:, mask]
    return cut


def _without_picture(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _PICTURE}


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
            if isinstance(edit, (HeadScale, HeadMean)) or edit.rows is Rows.ALL:
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
