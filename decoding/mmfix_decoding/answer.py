"""What the decoder hands back, and how a row of token ids becomes it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Args:
        text: the answer, without special tokens and surrounding whitespace.
        token_ids: generated ids, without padding and the token that ended the answer.
        tokens: the vocabulary's spelling of each id (sub-word marks such as ``▁`` or ``Ġ`` included).
        prompt: the prompt as it was given, before the chat template.
        finish_reason: ``"stop"`` when the model ended the answer, ``"length"`` when `max_new_tokens` cut it.
        seconds: wall time of ``model.generate`` for the answer's batch, divided by the answers in it, so that the sum
            over answers is the time spent.
        report: ``Mitigation.report()`` as a dict, or None without a method. It covers the *whole call*: every answer
            of one call carries the same dict, so do not add reports up over the answers of a call.
    """

    text: str
    token_ids: list[int]
    tokens: list[str]
    prompt: str
    finish_reason: FinishReason
    seconds: float
    report: dict[str, Any] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class TokenEvent:
    """One token of a stream, at the moment it is generated.

    Args:
        text: text that became certain with this token; empty while a character or a run of spaces is unfinished.
            The texts of a stream, joined and stripped, are the text of the answer.
        token_id: the token's id.
        logprob: natural logarithm of the token's probability under the final distribution (after every logits
            processor; temperature and the like are part of it when sampling), in float32.
        entropy: entropy of that distribution in nats, between 0 and log(vocabulary size).
        masses: share of attention that the position which chose this token gave to each group of keys, mean over layers
            and heads: ``"image"`` and ``"text"`` sum to 1, the further groups are parts of these two. None without
            telemetry.
        index: 0 for the first generated token.
        image_weights: attention that this position gave to each image token, in prompt order, mean over layers and
            heads; None unless asked for.
        side: in a paired stream ``"plain"`` or ``"method"``; empty otherwise.
    """

    text: str
    token_id: int
    logprob: float
    entropy: float
    masses: dict[str, float] | None
    index: int
    image_weights: tuple[float, ...] | None = field(default=None, repr=False)
    side: str = ""


def cut(
    row: Sequence[int], stop_ids: Collection[int], pad_id: int | None, limit: int
) -> tuple[list[int], FinishReason]:
    """The answer's own ids in a generated row, and why it ended.

    Args:
        row: generated ids, right-padded.
        stop_ids: ids that end an answer.
        pad_id: id of padding, or None.
        limit: `max_new_tokens` of the call.
    """
    ids = list(row)
    for place, token in enumerate(ids):
        if token in stop_ids:
            return ids[:place], "stop"
    while ids and ids[-1] == pad_id:  # a row that a stop string ended before the rest of its batch
        ids.pop()
    return ids, "length" if len(ids) >= limit else "stop"


# The end of a decoded text that a further token may still change: an unfinished character (U+FFFD), spaces (a decoder
# may drop them before punctuation), an apostrophe (it may become part of "n't").
_UNSETTLED = re.compile(r"[\s'\ufffd]+\Z")


class Detokenizer:
    """Turns ids into text one at a time, so that the pieces join to what decoding all ids at once gives.

    A sub-word alone has no text of its own (spaces, bytes of a multi-byte character), so everything so far is decoded
    and only what is certain is handed out.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._text = ""
        self._sent = ""

    @property
    def waiting(self) -> bool:
        """True while some decoded text is held back."""
        return len(self._text) > len(self._sent)

    def add(self, token_id: int) -> str:
        """Take one more id; the text that became certain."""
        self._ids.append(token_id)
        self._text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._send(_UNSETTLED.sub("", self._text))

    def flush(self) -> str:
        """The text still held back: no further id will come."""
        return self._send(self._text)

    def _send(self, certain: str) -> str:
        if not certain.startswith(self._sent):  # shorter, or (malformed bytes only) changed behind our back
            return ""
        piece = certain[len(self._sent) :]
        self._sent = certain
        return piece
