"""MAS: segment-based attention masking."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfix.errors import MethodError, MmfixError
from mmfix.families import Family
from mmfix.method import Method, Site, chosen_layers
from mmfix.registry import param, register
from mmfix.segments import MaskEdit, Role


@register("mas", title="Segment-Based Attention Masking", paper="arXiv:2412.18487", kind="mask", trained_in_paper=True)
@dataclass(frozen=True, kw_only=True)
class MAS(Method):
    """Let the tokens of one block of the prompt see each other, whatever their order.

    *Segment-Based Attention Masking for GPTs* (ACL 2025, arXiv:2412.18487). At prefill, in every layer and head::

        allowed[q, k] = k <= q  or  (q and k lie in the same block)

    The system text is one block; every user turn is one, from its header to the assistant's, pictures included. The
    assistant's side stays causal, padding stays hidden, and decoding is unchanged. No position changes and no extra
    pass. The paper tunes the model with this mask (LoRA); used without training it is an extrapolation that has to be
    measured.

    Blocks come from token spans, so that prompts of embeddings (with an image mask) have them too: there, and wherever
    no user header is known, the text before the first image is the system's and the rest is one user turn. A prompt
    in pieces is fine as long as no piece ends inside a block. A prompt without an image is left alone.

    The released code finds blocks by the header and end-of-turn ids of two text templates and pairs the two lists in
    order, so that a missing end shifts all later blocks; here a block ends where the next header begins. It also needs
    a square mask, and so gives no further turn on a cache.

    Args:
        until: what the last block needs: an "assistant" marker at its end, or nothing ("prompt": where no marker is
            known, the last block reaches to the end of the prompt).
        marker: token ids that begin an answer; None takes those of the processor given to ``mitigate``.
        layers: layers in which the mask opens; None means all. No layer at all is no change.

    Raises:
        MethodError: ``until="assistant"`` and no marker is known.
        MmfixError: at prefill, a prompt with an image has no assistant marker, or a piece of it ends inside a block.
    """

    until: Literal["assistant", "prompt"] = param("assistant", "what the last block needs at its end")
    marker: tuple[int, ...] | None = param(None, "token ids that begin an answer; empty = the processor's")
    layers: tuple[int, ...] | None = param(None, "layers in which the mask opens; empty = all")

    def __post_init__(self) -> None:
        if self.until not in ("assistant", "prompt"):
            raise MethodError(f"mas.until={self.until!r}: choose 'assistant' or 'prompt'")
        for name in ("marker", "layers"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(int(n) for n in value))

    def prepare(self, family: Family) -> MAS:
        if self.layers is not None:
            self = dataclasses.replace(self, layers=chosen_layers(self, (), family.num_layers))
        if self.until == "prompt" or self.marker:
            return self
        if family.markers is None:
            raise MethodError(
                "mas: the token ids that begin an answer are unknown, so the end of a user's block is too; pass "
                "processor= to mitigate(), or give marker=(…), or until='prompt' for prompts of a single turn"
            )
        return dataclasses.replace(self, marker=family.markers.assistant)

    @property
    def answer_marker(self) -> tuple[int, ...] | None:
        return self.marker

    def mask(self, site: Site) -> Sequence[MaskEdit]:
        if self.layers is not None and site.layer not in self.layers:
            return ()
        has_image, segments = site.spans.has_image, site.segments
        if self.until == "assistant" and segments is not None and bool((has_image & ~segments.ends).any()):
            raise MmfixError(
                f"mas: a prompt with an image has no token ids {list(self.marker or ())}, which begin an answer; end "
                "the prompt with the assistant's header (add_generation_prompt=True), or use until='prompt'"
            )
        return (MaskEdit(queries=Role.PROMPT, keys=Role.PROMPT, relation="same_block", batch=has_image),)
