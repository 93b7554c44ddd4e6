"""PINE: position-invariant inference."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from torch import Tensor

from mmfix.errors import MethodError, MmfixError
from mmfix.families import Family
from mmfix.method import Method, Site
from mmfix.methods.frame_block import frames, tokens_per_picture
from mmfix.registry import param, register
from mmfix.reorder import Bounds, Reorder, plain_positions
from mmfix.spans import TokenSpans


@register("pine", title="Position-INvariant inferencE", paper="arXiv:2407.01100", kind="positions")
@dataclass(frozen=True, kw_only=True)
class PINE(Method):
    """Make the answer independent of the order in which pictures, or documents, are given.

    *Eliminating Position Bias of Language Models: A Mechanistic Approach* (ICLR 2025, arXiv:2407.01100). The prompt is
    prefix, segments D_1 … D_m, suffix; the segments are pictures, or the documents between `separator`. In every layer
    and head, at the prompt and in decoding::

        Z        = softmax(q k^T / sqrt(d)) over segment tokens, without positions, a query's own segment left out
        imp(q,k) = mean of Z over the tokens of D_k; summed over the queries of a segment, per token after them
        order    = segments by falling imp, a query's own segment first
        position of D_k = its end at the end of the segments, moved back by the lengths of all segments before it in
                          the order: what matters most lies nearest to what follows

    Segments see each other whole, themselves causally; prefix and suffix are causal. Every permutation of the segments
    gives the same answer, up to rounding. One pass per token; m more products of the query per layer, and a ranking for
    every query and head. Ranking is per query head, also where heads share keys, and stable.

    The released code rotates the keys of every head and query anew (memory for heads x queries x keys x width), takes
    one prompt at a time, and knows Llama and Qwen2 text models only. Here queries are moved instead of keys, prompts of
    a batch have segments of their own, and decoding may use beams, no cache or one of fixed size (not compiled). It is
    computed densely in float32, not by a fused kernel, and alone, without other methods. A prompt with fewer than two
    pictures is left alone.

    A picture is a run of image tokens, cut into pieces of `tokens` where pictures touch. Text between two pictures
    belongs to the one before it, so that permuting pictures means permuting them with that text.

    A document runs from one `separator` up to the next; the last separator ends the last document and belongs to the
    suffix, so that m documents have m + 1 of them. Pictures are then no segments, but documents may hold some.

    Args:
        tokens: image tokens per picture, at least 1. None takes the number from the model's configuration, and where it
            does not tell, the length of each run of image tokens.
        separator: begins every document and ends the last one: token ids, or a text that is tokenised by itself
            (``processor=`` in ``mitigate()``). None takes pictures as segments.

    Raises:
        MethodError: a number of tokens below 1, or a separator without tokens.
        UnsupportedModel: no plain rotary embedding, sliding windows, or image tokens numbered along several axes.
        MmfixError: the prompt came in pieces or turns, a run of image tokens is no whole number of pictures, or a
            separator is looked for in embeddings.
        ConflictError: other methods beside it.
    """

    tokens: int | None = param(None, "image tokens per picture; empty = the model's, or one picture per run", 1)

    separator: str | tuple[int, ...] | None = param(
        None, "begins every document and ends the last: token ids, or text; empty = segments are pictures"
    )

    def __post_init__(self) -> None:
        if self.separator is not None and not isinstance(self.separator, str):
            object.__setattr__(self, "separator", tuple(int(n) for n in self.separator))
        if self.separator is not None and not self.separator:
            raise MethodError("pine.separator is empty; give token ids or a text that stands in front of each document")
        if self.tokens is not None and (not isinstance(self.tokens, int) or self.tokens < 1):
            raise MethodError(f"pine.tokens={self.tokens!r}: give a whole number from 1 on, or None")

    @property
    def tells_pictures_apart(self) -> bool:
        return self.separator is None

    def prepare(self, family: Family) -> PINE:
        if isinstance(self.separator, str):
            if family.encode is None:
                raise MethodError(
                    "pine.separator is text and the model's tokenizer is unknown; pass processor= to mitigate(), or "
                    "give its token ids"
                )
            return dataclasses.replace(self, separator=tuple(family.encode(self.separator)))
        return dataclasses.replace(self, tokens=self.tokens or tokens_per_picture(family))

    def positions(self, spans: TokenSpans) -> Tensor:
        """Zeros where segments are reordered: the model rotates nothing, and the attention does it."""
        plain = plain_positions(spans)
        return plain * 0 if any(len(bounds) > 1 for bounds in self.bounds(spans)) else plain

    def reorder(self, site: Site) -> Reorder | None:
        bounds = self.bounds(site.spans)
        return Reorder(bounds, site.spans.valid) if any(len(b) > 1 for b in bounds) else None

    def bounds(self, spans: TokenSpans) -> tuple[Bounds, ...]:
        """Start and stop of each prompt's segments."""
        if self.separator is not None:
            return self._documents(spans)
        found = []
        for image, number in zip(spans.image.tolist(), frames(spans.image, self.tokens).tolist(), strict=True):
            places = [n for n, one in enumerate(image) if one]
            starts = [n for n in places if n == 0 or number[n] != number[n - 1]]
            stops = [*starts[1:], places[-1] + 1] if places else []
            found.append(tuple(zip(starts, stops, strict=True)))
        return tuple(found)

    def _documents(self, spans: TokenSpans) -> tuple[Bounds, ...]:
        """Segments between separators."""
        if spans.ids is None:
            raise MmfixError(
                "pine: documents are found by the ids of their separator, and the prompt came as inputs_embeds; pass "
                "input_ids"
            )
        wanted, found = list(self.separator or ()), []
        for ids, valid in zip(spans.ids.tolist(), spans.valid.tolist(), strict=True):
            starts = [n for n in range(len(ids) - len(wanted) + 1) if valid[n] and ids[n : n + len(wanted)] == wanted]
            found.append(tuple(itertools.pairwise(starts)))
        return tuple(found)
