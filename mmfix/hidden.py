"""Hidden states scaled on their way into queries and keys, not into values.

The projections of an attention module are separate Linear modules; hooks in front of ``q_proj`` and ``k_proj`` change
what these read and leave ``v_proj`` alone, whatever the attention's class. At the prompt, rows that are to stay plain
are computed by calling the attention once more, without the hooks and without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfix.errors import UnsupportedModel
from mmfix_kernels import Rows

if TYPE_CHECKING:
    from mmfix.families import Family
    from mmfix.layers import LayerState
    from mmfix.session import Session

_CACHE = "past_key_values"


@dataclass(frozen=True, kw_only=True)
class HiddenScale:
    """Multiply some dimensions of an attention layer's input, for queries and keys alone.

    Args:
        dims: hidden dimensions.
        factor: what they are multiplied by.
        last: rows at the end of the prompt that see the change, beside every generated token; the others attend as
            ever, with plain queries to plain keys. Later rows find changed keys in the cache.
        skip: tokens at the start of a prompt that are left alone.
    """

    dims: tuple[int, ...]
    factor: float
    last: int = 1
    skip: int = 0


class HiddenHooks:
    """The hooks of one attention module.

    Args:
        module: the attention.
        state: of its layer.
        scales: (position of the method, what it scales), in order.

    Raises:
        UnsupportedModel: queries, keys and values come from one matrix, so that values cannot be left alone.
    """

    def __init__(
        self, family: Family, module: nn.Module, state: LayerState, scales: list[tuple[int, HiddenScale]]
    ) -> None:
        self.state, self.session, self.scales = state, state.session, scales
        parts = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        if not all(isinstance(part, nn.Module) for part in parts) or len({id(part) for part in parts}) < 3:
            names = " and ".join(repr(self.session.methods[owner].info.name) for owner, _ in scales)
            raise UnsupportedModel(
                f"{family.name}: {type(module).__name__} has no separate q_proj, k_proj and v_proj, and {names} "
                "changes what queries and keys read without what values read; use another method or model"
            )
        self.module, self.projections = module, parts[:2]

    def install(self) -> Iterator[Any]:
        """Handles that remove the hooks again, each as its hook is made."""
        for part in self.projections:
            yield part.register_forward_pre_hook(self._entering)  # type: ignore[union-attr]
        yield self.module.register_forward_hook(self._leaving, with_kwargs=True)

    @property
    def acting(self) -> bool:
        """Whether the call at hand is the model's own, for prompts with an image."""
        session = self.session
        if not session.active or session.aside or self.state.repeating or session.spans is None:
            return False
        if session.comparing or session.measuring is not None:  # a pass beside the model's own
            return False
        return session.current.single or session.spans.any_image

    def _entering(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.acting:
            return None
        hidden: Tensor = args[0]
        for _, scale in self.scales:
            index = list(scale.dims)
            new = hidden[..., index] * scale.factor
            where = scaled_keys(self.session, scale, hidden)
            if where is not None:
                new = torch.where(where[..., None], new, hidden[..., index])
            hidden = hidden.clone()
            hidden[..., index] = new.to(hidden.dtype)
        return (hidden, *args[1:])

    def _leaving(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.acting:
            return None
        new = output[0] if isinstance(output, tuple) else output
        rows = changed_rows(self.session, max(scale.last for _, scale in self.scales), new)
        heads = self.session.family.num_heads
        count = rows.sum() if rows is not None else torch.tensor(new.shape[0] * new.shape[1], device=new.device)
        for owner, _ in self.scales:
            places = count.new_tensor(new.shape[0] * new.shape[1])
            self.state.count(owner, torch.stack([count, places]) * heads, new.device)
        if rows is None or not self.session.current.at_prompt:
            return None
        self.state.repeating = True
        try:
            plain = self._plain(args, kwargs)
        finally:
            self.state.repeating = False
        merged = torch.where(rows[..., None], new, plain)
        return (merged, *output[1:]) if isinstance(output, tuple) else merged

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The attention's output [B, L, hidden] as it would be without the hooks, from the prompt alone."""
        output = self.module.forward(*args, **{**kwargs, _CACHE: None})
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found


def scaled_keys(session: Session, scale: HiddenScale, hidden: Tensor) -> Tensor | None:
    """Bool[B, L]: tokens of this pass whose hidden state is scaled; None means all."""
    assert session.spans is not None
    if session.current.single:
        return session.current.rows[Rows.AFTER_IMAGE]
    chosen = session.spans.has_image[:, None]
    if scale.skip and session.current.past == 0:
        place = session.spans.valid.long().cumsum(-1) - 1
        beyond = hidden.shape[1] - place.shape[1]
        place = torch.nn.functional.pad(place, (0, max(0, beyond)), value=scale.skip)[:, : hidden.shape[1]]
        return chosen & (place >= scale.skip)
    return chosen.expand(-1, hidden.shape[1])


def changed_rows(session: Session, last: int, like: Tensor) -> Tensor | None:
    """Bool[B, L]: rows of this pass that attend with what is scaled; None means all."""
    assert session.spans is not None
    spans, current = session.spans, session.current
    if current.single:
        return current.rows[Rows.AFTER_IMAGE]
    place = torch.arange(current.past, current.past + like.shape[1], device=like.device)
    rows = spans.has_image[:, None].expand(-1, like.shape[1])
    if current.at_prompt:
        rows = rows & (place[None, :] > (spans.last - last)[:, None])
    return rows


def hooks(family: Family, session: Session) -> list[HiddenHooks]:
    """The hooks that the methods ask for."""
    found = []
    for layer, (module, state) in enumerate(zip(family.attentions, session.layers, strict=True)):
        asked = [(n, m.hidden_scale(layer)) for n, m in enumerate(session.methods)]
        scales = [(n, scale) for n, scale in asked if scale is not None]
        if scales and layer not in family.cross_layers:
            found.append(HiddenHooks(family, module, state, scales))
    return found
