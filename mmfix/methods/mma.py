"""MMA: modality-mutual attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfix.errors import MethodError, MmfixError
from mmfix.families import Family
from mmfix.method import Method, Site, layer_numbers
from mmfix.registry import param, register
from mmfix.segments import MaskEdit, Role


@register("mma", title="Modality-Mutual Attention", paper="arXiv:2503.02597", kind="mask", trained_in_paper=True)
@dataclass(frozen=True, kw_only=True)
class MMA(Method):
    """Let image tokens attend to the question that follows them.

    *Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention* (arXiv:2503.02597). At prefill,
    in every layer and head::

        allowed[q, k] = k <= q  or  (q is an image token and k is a later text token of the same user turn)

    Padding stays hidden, images do not see later images, text before an image and every answer stay causal; decoding is
    unchanged. No position changes and no extra pass. The paper trains with this mask; used without training it is an
    extrapolation that has to be measured.

    Args:
        until: where the text that images may see ends: at the "assistant" marker of their turn (exclusive), or at the
            end of the "prompt". The released code also opens the marker's first token, which is not reproduced.
        marker: token ids that begin an answer; empty takes those of the processor given to ``mitigate``.
        layers: layers in which the mask opens; empty means all. None of them is no change.

    Raises:
        MethodError: ``until="assistant"`` and no marker is known.
        MmfixError: at prefill, a prompt with an image has no assistant marker.
    """

    until: Literal["assistant", "prompt"] = param("assistant", "end of the text that images may see")
    marker: tuple[int, ...] | None = param(None, "token ids that begin an answer; empty = the processor's")
    layers: tuple[int, ...] | None = param(None, "layers in which the mask opens; empty = all")

    def __post_init__(self) -> None:
        if self.until not in ("assistant", "prompt"):
            raise MethodError(f"mma.until={self.until!r}: choose 'assistant' or 'prompt'")
        for name in ("marker", "layers"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(int(n) for n in value))

    def prepare(self, family: Family) -> MMA:
        if self.layers is not None:
            layers = layer_numbers("mma.layers", self.layers, family.num_layers)
            self = dataclasses.replace(self, layers=layers)
        if self.until == "prompt" or self.marker:
            return self
        if family.markers is None:
            raise MethodError(
                "mma: the token ids that begin an answer are unknown; pass processor= to mitigate(), or give "
                "marker=(…), or until='prompt' for prompts of a single turn"
            )
        return dataclasses.replace(self, marker=family.markers.assistant)

    @property
    def answer_marker(self) -> tuple[int, ...] | None:
        return self.marker if self.until == "assistant" else None

    def mask(self, site: Site) -> Sequence[MaskEdit]:
        if self.layers is not None and site.layer not in self.layers:
            return ()
        segments = site.segments
        if self.until == "assistant" and segments is not None and bool((site.spans.has_image & ~segments.ends).any()):
            raise MmfixError(
                f"mma: a prompt with an image has no token ids {list(self.marker or ())}, which begin an answer; end "
                "the prompt with the assistant's header (add_generation_prompt=True), or use until='prompt'"
            )
        keys = Role.QUESTION | Role.ANSWER if self.until == "prompt" else Role.QUESTION
        return (MaskEdit(queries=Role.IMAGE, keys=keys, relation="same_turn"),)
