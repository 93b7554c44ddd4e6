"""The prompt's last token, lent to a placeholder at its start from layer to layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmfix.session import Session


class Prepending:
    """A hook in front of one decoder layer: the token before the first image takes the state of the prompt's last.

    It acts once per prompt; later tokens find the placeholder's keys and values in the cache.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        session = self.session
        beside = session.aside or session.comparing or session.measuring is not None
        if not session.active or beside or not session.current.at_prompt or session.spans is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        changed = lent(hidden, session.spans.image, session.spans.last)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})


def lent(hidden: Tensor, image: Tensor, last: Tensor) -> Tensor:
    """[B, L, hidden] with the state of token `last` also at the token before the first image, in prompts with one.

    Args:
        image: Bool[B, T], T at most L.
        last: Int64[B].
    """
    rows = image.any(-1).nonzero()[:, 0]
    place = image[rows].int().argmax(-1) - 1
    changed = hidden.clone()
    changed[rows, place] = hidden[rows, last[rows]]
    return changed


def install(session: Session, layers: tuple[nn.Module, ...]) -> Iterator[Any]:
    """Handles of the hooks that methods ask for, each as its hook is made."""
    for n, layer in enumerate(layers):
        if any(m.prepends(n) for m in session.methods):
            yield layer.register_forward_pre_hook(Prepending(session), with_kwargs=True)


def before_image(ids: Tensor, image: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """One prompt's ids and image mask, [T] without padding, with `token` before the first image."""
    if not bool(image.any()):
        return ids, image
    first = int(image.int().argmax())
    new, none = ids.new_full((1,), token), torch.zeros_like(image[:1])
    return torch.cat([ids[:first], new, ids[first:]]), torch.cat([image[:first], none, image[first:]])
