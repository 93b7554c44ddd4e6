"""The prompt with and without its image, in two plain passes of its own: its last token's states, layer by layer.

A method that steers along their difference (VISTA) needs them before the first layer of the real pass is changed.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfix.textonly import TextOnly

if TYPE_CHECKING:
    from mmfix.session import Session

_TOKENS = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids", "mm_token_type_ids")
_LEFT_OUT = (
    "past_key_values",
    "cache_position",
    "use_cache",
    "labels",
    "logits_to_keep",
    "attention_mask",
    "return_dict",
)


def last_states(session: Session, kwargs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """For every layer, its outputs at the last token of the prompts at hand, with and without the image; [B, hidden].

    The prompts of a branched batch have those of their factual row.

    Args:
        kwargs: inputs of the pass at hand, whose first tokens are the prompts.
    """
    family, talk = session.family, session.talk
    assert talk is not None
    spans = talk.spans
    count = session.rows_per_prompt
    types = kwargs.get("token_type_ids")
    short = TextOnly(
        family, spans, talk.ids, talk.embeds, 0, False, None if types is None else types[:, : spans.length]
    )
    typed = {} if short.types is None else {"token_type_ids": short.types}
    mask = short.mask.long()
    session.comparing = True
    try:
        with torch.no_grad():
            last = torch.full_like(spans.last, mask.shape[1] - 1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            text: dict[str, Any] = {"inputs_embeds": short.hidden, "attention_mask": mask, "position_ids": positions}
            without = _states(session, last, family.model.base_model, {**text, **typed})
            whole = _states(
                session,
                spans.last,
                family.model.forward,
                {**_prompt(kwargs, spans.length), "logits_to_keep": 1, "attention_mask": spans.valid.long()},
            )
    finally:
        session.comparing = False
    session.extra_passes += 2
    pairs = zip(whole, without, strict=True)
    return [(a[::count].repeat_interleave(count, 0), b[::count].repeat_interleave(count, 0)) for a, b in pairs]


def _prompt(kwargs: dict[str, Any], length: int) -> dict[str, Any]:
    """Inputs of the first `length` tokens alone, for a pass without a cache."""
    kept = {k: v for k, v in kwargs.items() if v is not None and k not in _LEFT_OUT and not k.startswith("output_")}
    for name in _TOKENS:
        if name == "inputs_embeds" and name in kept:
            kept[name] = kept[name][:, :length]
        elif name in kept:
            kept[name] = kept[name][..., :length]
    if isinstance(kept.get("mm_encoder_outputs"), dict):  # the model may add to it
        kept["mm_encoder_outputs"] = dict(kept["mm_encoder_outputs"])
    return kept


def _states(session: Session, last: Tensor, call: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """What each layer gives at token `last` [B] of one plain pass."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found.append(states[torch.arange(len(last), device=states.device), last.to(states.device)])

    with ExitStack() as stack:
        for layer in session.family.layers:
            stack.callback(layer.register_forward_hook(note).remove)
        call(**inputs, use_cache=False)
    return found
