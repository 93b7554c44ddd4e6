"""Who says what in a prompt: role, image number and turn of every token, and the masks that follow from them.

One generator serves every method that opens or closes attention between parts of a prompt: a :class:`MaskEdit` names
query roles, key roles and a relation, and :func:`opened` turns it into the pairs that change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfix.errors import MmfixError
from mmfix_kernels import AttentionCall


class Role(IntFlag):
    """What a token is; a set of roles is their union."""

    SYSTEM = 1  # text before the first user turn, or before the first image where turns are not known
    IMAGE = 2
    QUESTION = 4  # text of the user's side of a turn
    ANSWER = 8  # the assistant's header and what follows it, up to the next user turn
    TEXT = SYSTEM | QUESTION | ANSWER
    PROMPT = SYSTEM | IMAGE | QUESTION


Relation = Literal["any", "same_turn", "same_image", "other_image", "same_block"]
# A relation of a method's own, hashable: (segments, query rows) -> Bool[B, rows, T].
PairRelation = Callable[["Segments", slice], Tensor]


@dataclass(frozen=True)
class Markers:
    """Token ids that open the two sides of a conversation.

    Args:
        assistant: ids with which every assistant turn begins, such as those of ``ASSISTANT:``.
        user: ids with which every user turn begins; empty when they are not known (then there is one turn).
    """

    assistant: tuple[int, ...]
    user: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MaskEdit:
    """Open (or close) attention from some query tokens to some key tokens of the prompt.

    A pair changes when the query's role is in `queries`, the key's role is in `keys` and `relation` holds between them.
    Padding is never opened, and nothing changes for generated tokens.

    Args:
        queries, keys: sets of roles.
        relation: "any"; "same_turn"; "same_image" or "other_image" (both tokens of images); "same_block" (both of the
            system text, or both of one user turn, its images included); or a hashable callable of the method's own,
            which is given the segments and the query rows and returns Bool[B, rows, T].
        allow: True opens pairs that the causal mask hides; False hides pairs that it shows.
        share: the rows attend ``(1 - share)`` as before and `share` with the pairs changed, in outputs; 0 to 1.
        batch: Bool[B], the prompts that are touched; None means all.
    """

    queries: Role
    keys: Role
    relation: Relation | PairRelation = "any"
    allow: bool = True
    share: float = 1.0
    batch: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"MaskEdit.share={self.share}: give a number from 0 to 1")


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of a batch of prompts, [B, T].

    Args:
        role: Int8[B, T], a :class:`Role` each; 0 on padding.
        image: Int64[B, T], number of the image a token belongs to, in order; -1 for text.
        turn: Int64[B, T], number of the user turn, from 0; -1 before the first one where turns are known.
        ends: Bool[B], whether an assistant marker was found in the prompt.
    """

    role: Tensor
    image: Tensor
    turn: Tensor
    ends: Tensor

    def among(self, roles: Role) -> Tensor:
        """Bool[B, T]: tokens whose role is in the set."""
        return (self.role & int(roles)) != 0


def build(ids: Tensor | None, image: Tensor, valid: Tensor, markers: Markers | None) -> Segments:
    """Segments of prompts.

    Args:
        ids: Int64[B, T]; None when only embeddings are known, and then no marker can be found.
        image, valid: Bool[B, T].
        markers: None takes everything after the first image's start for one question without an answer.
    """
    image = image & valid
    starts = image & ~F.pad(image[:, :-1], (1, 0))
    number = torch.where(image, starts.long().cumsum(-1) - 1, -1)
    answer_at = _begins(ids, markers.assistant if markers else ())
    user_at = _begins(ids, markers.user if markers else ())
    none = torch.zeros_like(image)
    answer_at, user_at = (none if x is None else x & valid for x in (answer_at, user_at))
    # The latest marker before (or at) a token says whose side it is on.
    place = torch.arange(image.shape[1], device=image.device).expand_as(image)
    last_answer = torch.where(answer_at, place, -1).cummax(-1).values
    last_user = torch.where(user_at, place, -1).cummax(-1).values
    answer = last_answer > last_user
    if markers is not None and markers.user:
        turn = user_at.long().cumsum(-1) - 1
        system = ~answer & (turn < 0)
    else:
        turn = torch.zeros_like(number)
        seen = image.long().cumsum(-1) > 0
        system = ~answer & ~seen & image.any(-1, keepdim=True)
    role = torch.full(image.shape, int(Role.QUESTION), dtype=torch.int8, device=image.device)
    role[system] = int(Role.SYSTEM)
    role[answer] = int(Role.ANSWER)
    role[image] = int(Role.IMAGE)
    role[~valid] = 0
    return Segments(role, number, turn, answer_at.any(-1))


def _begins(ids: Tensor | None, marker: Sequence[int]) -> Tensor | None:
    """Bool[B, T]: where `marker` begins; None without ids or marker."""
    if ids is None or not marker:
        return None
    found = torch.zeros_like(ids, dtype=torch.bool)
    width = len(marker)
    if ids.shape[1] >= width:
        windows = ids.unfold(1, width, 1)
        found[:, : windows.shape[1]] = (windows == torch.tensor(marker, device=ids.device)).all(-1)
    return found


def pairs(segments: Segments, edit: MaskEdit, start: int, stop: int) -> Tensor:
    """Bool[B, stop - start, T]: the (query, key) pairs that an edit names, for query rows start:stop."""
    rows = slice(start, stop)
    chosen = segments.among(edit.queries)[:, rows, None] & segments.among(edit.keys)[:, None, :]
    q_image, k_image = segments.image[:, rows, None], segments.image[:, None, :]
    if callable(edit.relation):
        chosen &= edit.relation(segments, rows)
    elif edit.relation == "same_image":
        chosen &= (q_image == k_image) & (q_image >= 0)
    elif edit.relation == "other_image":
        chosen &= (q_image != k_image) & (q_image >= 0) & (k_image >= 0)
    elif edit.relation in ("same_turn", "same_block"):
        chosen &= segments.turn[:, rows, None] == segments.turn[:, None, :]
    if edit.relation == "same_block":
        system, user = segments.among(Role.SYSTEM), segments.among(Role.QUESTION | Role.IMAGE)
        chosen &= (system[:, rows, None] & system[:, None, :]) | (user[:, rows, None] & user[:, None, :])
    return chosen


@dataclass(frozen=True, eq=False)
class Opened:
    """What the mask edits of one layer change in a pass.

    Args:
        open, close: Bool[B, 1, l, T], pairs of the prompt's newest l tokens with all its T tokens; None for none.
        share: of the outputs that is computed with the change.
    """

    open: Tensor | None
    close: Tensor | None
    share: float

    def apply(self, call: AttentionCall, window: int | None, offset: int) -> Tensor:
        """The mask of `call`, [B, 1, L, S] in the form it had (Bool, or additive), changed.

        Args:
            call: its rows begin with the prompt's newest tokens; generated ones may follow.
            window: sliding window of the layer; a key that far from its query, or farther, is not opened.
            offset: position of the first key.
        """
        some = self.open if self.open is not None else self.close
        assert some is not None
        batch, length, keys = call.query.shape[0], call.query.shape[2], call.keys
        start = some.shape[3] - some.shape[2]
        rows = torch.arange(start, start + length, device=some.device)[:, None]
        columns = torch.arange(offset, offset + keys, device=some.device)[None, :]
        mask = call.mask
        if mask is None:
            base = columns <= rows if call.is_causal else columns >= 0
            mask = base[None, None]
        changed: Tensor = mask.expand(batch, mask.shape[1], length, keys)
        low, high = (False, True) if changed.dtype == torch.bool else (torch.finfo(changed.dtype).min, 0.0)
        for chosen, value in ((self.open, high), (self.close, low)):
            if chosen is None:
                continue
            fitted = chosen[..., offset : offset + keys]
            fitted = F.pad(fitted, (0, keys - fitted.shape[-1], 0, length - fitted.shape[-2]))
            if window is not None:
                fitted = fitted & ((rows - columns).abs() < window)
            changed = changed.masked_fill(fitted, value)
        return changed


def opened(segments: Segments, edits: Sequence[MaskEdit], start: int, ahead: bool = False) -> Opened | None:
    """What `edits` change for query rows start: (the tokens of the pass at hand); None when nothing does.

    Args:
        ahead: the model itself lets image tokens see later ones of their picture, which is closed too.

    Raises:
        MmfixError: an opened key is in this pass and its query was in an earlier one, so it can no longer see it.
    """
    length = segments.role.shape[1]
    position = torch.arange(length, device=segments.role.device)
    causal = position[None, :] <= position[start:, None]
    found: dict[bool, Tensor] = {}
    for edit in edits:
        if edit.allow and start:
            late = _touched(edit, pairs(segments, edit, 0, start))[..., start:]
            if bool(late.any()):
                raise MmfixError(
                    "the prompt came in pieces and its first tokens were to see tokens of a later piece; give the "
                    "whole prompt at once (no prefill_chunk_size), or each turn whole"
                )
        chosen = _touched(edit, pairs(segments, edit, start, length))
        if edit.allow or not ahead:
            chosen = chosen & (~causal if edit.allow else causal)
        found[edit.allow] = found[edit.allow] | chosen if edit.allow in found else chosen
    shares = {edit.share for edit in edits}
    if len(shares) > 1:
        raise MmfixError(f"mask edits of one layer have different shares {sorted(shares)}; give one share per layer")
    some = {allow: chosen[:, None] for allow, chosen in found.items() if bool(chosen.any())}
    if not some or shares == {0.0}:
        return None
    return Opened(some.get(True), some.get(False), shares.pop())


def _touched(edit: MaskEdit, chosen: Tensor) -> Tensor:
    """Pairs [B, l, T] of the prompts that an edit touches."""
    return chosen if edit.batch is None else chosen & edit.batch.to(chosen.device)[:, None, None]


def chat_markers(processor: Any) -> Markers:
    """Markers of a processor's (or tokenizer's) chat template, found by rendering short conversations with it.

    Raises:
        MmfixError: there is no chat template, or the assistant's side has no header of its own.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not getattr(processor, "chat_template", None) and not getattr(tokenizer, "chat_template", None):
        raise MmfixError(
            f"{type(processor).__name__} has no chat template, so the assistant's marker is unknown; give the token "
            "ids that begin an answer (mma: marker=…), or until='prompt'"
        )

    def rendered(*texts: str, prompt: bool = False) -> list[int]:
        roles = ("user", "assistant")
        talk = [{"role": roles[n % 2], "content": [{"type": "text", "text": t}]} for n, t in enumerate(texts)]
        text = processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def common(first: list[int], second: list[int]) -> tuple[int, ...]:
        shared = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        return tuple(first[: min(len(first), len(second)) if shared is None else shared])

    one, asked = rendered("A"), rendered("A", prompt=True)
    kept = len(common(one, asked))
    assistant = tuple(asked[kept:])
    two = len(rendered("A", "B"))
    user = common(rendered("A", "B", "yes")[two:], rendered("A", "B", "no")[two:])
    if not assistant:
        raise MmfixError(
            f"the chat template of {type(processor).__name__} gives an answer no header, so questions cannot be told "
            "from answers; give the token ids that begin an answer (mma: marker=…), or until='prompt'"
        )
    return Markers(assistant, user)
