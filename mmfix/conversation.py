"""The tokens that the cache at hand holds: what they are, where the images lie, which were generated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfix import segments as token_segments
from mmfix import spans as token_spans
from mmfix.errors import MmfixError
from mmfix.inputs import rows_for
from mmfix.segments import Markers, Segments
from mmfix.spans import TokenSpans
from mmfix_kernels import Label


@dataclass(eq=False)
class Conversation:
    """Tokens up to the end of the newest prompt piece, [B, T]; generated ones after it are only counted.

    Args:
        ids: Int64[B, T], None when a piece came as embeddings.
        image, valid, generated: Bool[B, T].
        embeds: Float[B, T, hidden], kept only while there are no ids.
        spans: key groups and rows.
        steps: ids of the decode steps since, [B, L] each.
    """

    ids: Tensor | None
    image: Tensor
    valid: Tensor
    generated: Tensor
    embeds: Tensor | None
    spans: TokenSpans
    steps: list[Tensor | None] = field(default_factory=list)
    ordered: bool = True  # False once beams were reordered: which row wrote what is then unknown
    total: int = 0  # tokens with those of the steps

    def __post_init__(self) -> None:
        self.total = self.length

    @property
    def length(self) -> int:
        return self.image.shape[1]

    @staticmethod
    def begin(ids: Tensor | None, embeds: Tensor | None, image: Tensor, valid: Tensor) -> Conversation:
        """A prompt on an empty cache; everything [B, T]."""
        generated = torch.zeros_like(image)
        spans = token_spans.build(image, valid, ids)
        return Conversation(ids, spans.image, spans.valid, generated, embeds if ids is None else None, spans)

    def extended(
        self, ids: Tensor | None, embeds: Tensor | None, image: Tensor, valid: Tensor, past: int
    ) -> Conversation:
        """With a further piece of prompt after `past` tokens.

        Args:
            ids, embeds: of the piece, [B, L].
            image: Bool[B, L], image tokens of the piece.
            valid: Bool[B, past + L].
        """
        batch = image.shape[0]
        before = self.widened(batch)
        old_ids = before.all_ids(past)
        kept = min(past, before.length)

        def grown(tensor: Tensor, middle: bool, end: Tensor) -> Tensor:
            return torch.cat([F.pad(tensor[:, :kept], (0, past - kept), value=middle), end], dim=1)

        all_image = grown(before.image, False, image)
        generated = grown(before.generated, True, torch.zeros_like(image))
        known = None if old_ids is None or ids is None else torch.cat([old_ids, ids], dim=1)
        spans = token_spans.build(all_image, valid, known)
        labels = spans.labels.masked_fill(generated & valid, int(Label.GENERATED))
        return Conversation(known, spans.image, spans.valid, generated, None, dataclasses.replace(spans, labels=labels))

    def all_ids(self, length: int) -> Tensor | None:
        """Int64[B, length]: the first tokens, generated ones included; None where they are not known."""
        parts = [self.ids, *self.steps]
        if not self.ordered or any(part is None for part in parts):
            return self.ids[:, :length] if self.ids is not None and length <= self.length else None
        whole = torch.cat([part for part in parts if part is not None], dim=1)
        return whole[:, :length] if whole.shape[1] >= length else None

    def stepped(self, ids: Tensor | None, past: int) -> None:
        """Note a decode step of `ids` after `past` tokens; what lay beyond (refused guesses) is forgotten."""
        known = [step for step in self.steps if step is not None]
        if past < self.total and known and len(known) == len(self.steps):
            self.steps = [torch.cat(known, dim=1)[:, : max(0, past - self.length)]]
        self.steps.append(ids)
        self.total = past + (0 if ids is None else ids.shape[1])

    def widened(self, batch: int) -> Conversation:
        """For a batch that grew by a whole factor (beams)."""
        if self.image.shape[0] == batch:
            return self
        spans = self.spans
        wide = TokenSpans(
            image=rows_for(spans.image, batch),
            valid=rows_for(spans.valid, batch),
            labels=rows_for(spans.labels, batch),
            starts={kind: rows_for(start, batch) for kind, start in spans.starts.items()},
            last=rows_for(spans.last, batch),
            ids=None if spans.ids is None else rows_for(spans.ids, batch),
        )
        ids, embeds = (None if x is None else rows_for(x, batch) for x in (self.ids, self.embeds))
        steps = [None if s is None else rows_for(s, batch) if s.shape[0] != batch else s for s in self.steps]
        return Conversation(ids, wide.image, wide.valid, rows_for(self.generated, batch), embeds, wide, steps)

    def segments(self, markers: Markers | None) -> Segments:
        """Roles, images and turns; generated tokens are answers."""
        found = token_segments.build(self.ids, self.image, self.valid, markers)
        role = found.role.masked_fill(self.generated & self.valid, int(token_segments.Role.ANSWER))
        return dataclasses.replace(found, role=role)


def image_tokens(ids: Tensor | None, shape: torch.Size, image_token_id: int, image_mask: Tensor | None) -> Tensor:
    """Bool[B, L]: image tokens of a piece of prompt, from the mask that the user set, else from the ids.

    Raises:
        MmfixError: neither is there, or the mask does not fit.
    """
    if image_mask is not None and ids is not None and image_mask.shape[-1] != shape[-1]:
        image_mask = None  # of an earlier prompt that came as embeddings
    if image_mask is not None:
        image = rows_for(image_mask, shape[0])
        if image.shape != shape:
            raise MmfixError(
                f"image_mask {tuple(image.shape)} does not fit the prompt {tuple(shape)}; "
                "set it to Bool[batch, tokens] of this prompt, or to None"
            )
        return image.bool()
    if ids is None:
        raise MmfixError(
            "inputs_embeds came without input_ids, so image tokens cannot be found; "
            "set the mitigation's image_mask to Bool[batch, tokens] first"
        )
    return ids == image_token_id
