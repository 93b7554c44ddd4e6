"""One attention call with its edits, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfix_kernels.edits import (
    Edit,
    HeadScale,
    HeadSelect,
    KeyGroups,
    Label,
    MapReplacement,
    MassMove,
    ScoreEdit,
    SplitSoftmax,
)
from mmfix_kernels.keyed import HeadMean, KeyGain, KeyMove
from mmfix_kernels.maps import places

MassRows = Literal["none", "last", "all"]
HEAD_EDITS = (HeadScale, HeadMean)  # edits of finished head outputs, which read no key


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """Inputs of grouped attention.

    Args:
        query: [B, H, L, D].
        key, value: [B, H_kv, S, D], H a multiple of H_kv (key/value heads are not repeated).
        mask: None, Bool (True = may attend) or additive float, broadcastable to [B, H, L, S].
        is_causal: with ``mask=None``, row i sees keys 0..i (L = S, or L = 1 which sees all).
        scale: factor on ``q·k``; default ``D**-0.5``.
        softcap: ``s <- softcap*tanh(s/softcap)`` before mask and edits.
        groups: labels and rows; needed as soon as there are edits or masses.
        edits: score edits act before the softmax, a split in its place, then mass moves and map replacements in order,
            then heads are selected, replaced by means, and scaled.
        masses: rows whose group masses are returned.
        prefix_key, prefix_value: [B // R, H_kv, P, D], keys and values that R consecutive batch items share and that
            stand before `key` and `value`; mask and labels then cover P + S keys. None when nothing is shared.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    groups: KeyGroups | None = None
    edits: Sequence[Edit] = ()
    masses: MassRows = "none"
    prefix_key: Tensor | None = None
    prefix_value: Tensor | None = None

    def __post_init__(self) -> None:
        b, h, q_len, d = self.query.shape
        kb, h_kv, _, kd = self.key.shape
        s_len = self.keys
        if kb != b or kd != d or h % h_kv or self.value.shape[:3] != self.key.shape[:3]:
            raise ValueError(
                f"query {tuple(self.query.shape)}, key {tuple(self.key.shape)} and value {tuple(self.value.shape)} do "
                "not fit: batch and head width must agree and the query heads be a multiple of the key heads"
            )
        if self.prefix_key is not None and (
            self.prefix_value is None or b % self.prefix_key.shape[0] or self.prefix_key.shape[1] != h_kv
        ):
            raise ValueError(
                f"prefix_key {tuple(self.prefix_key.shape)} does not fit a batch of {b} and {h_kv} key heads; give "
                "[B // R, H_kv, P, D] of keys and of values"
            )
        if self.mask is None and self.is_causal and q_len not in (1, s_len):
            raise ValueError(f"is_causal with {q_len} rows and {s_len} keys: slice the keys or give a mask")
        needs_groups = self.masses != "none" or any(not isinstance(e, HEAD_EDITS) for e in self.edits)
        if needs_groups and self.groups is None:
            raise ValueError("edits on key groups and group masses need `groups` (one label per key)")
        if self.groups is not None and self.groups.labels.shape not in ((b, s_len), (b, h, s_len)):
            shape = tuple(self.groups.labels.shape)
            raise ValueError(
                f"labels {shape}: expected one per key, {(b, s_len)}, or per head and key, {(b, h, s_len)}"
            )

    @property
    def keys(self) -> int:
        """Number of keys, those of the shared prefix included."""
        return self.key.shape[2] + (0 if self.prefix_key is None else self.prefix_key.shape[2])

    def whole(self, prefix: Tensor | None, tensor: Tensor) -> Tensor:
        """Keys or values with the shared prefix repeated in front."""
        if prefix is None:
            return tensor
        return torch.cat([prefix.repeat_interleave(tensor.shape[0] // prefix.shape[0], dim=0), tensor], dim=2)

    @property
    def factor(self) -> float:
        """The scale on ``q·k``."""
        return float(self.query.shape[-1] ** -0.5) if self.scale is None else self.scale

    @property
    def score_edits(self) -> list[tuple[int, ScoreEdit | KeyGain]]:
        return [(n, e) for n, e in enumerate(self.edits) if isinstance(e, (ScoreEdit, KeyGain))]

    @property
    def splits(self) -> list[tuple[int, SplitSoftmax]]:
        return [(n, e) for n, e in enumerate(self.edits) if isinstance(e, SplitSoftmax)]

    @property
    def weight_edits(self) -> list[tuple[int, MassMove | KeyMove | MapReplacement]]:
        return [(n, e) for n, e in enumerate(self.edits) if isinstance(e, (MassMove, KeyMove, MapReplacement))]

    @property
    def head_selects(self) -> list[tuple[int, HeadSelect]]:
        return [(n, e) for n, e in enumerate(self.edits) if isinstance(e, HeadSelect)]

    def row_places(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Int64[B, rows]: place of query rows start:stop among the keys that are not padding."""
        assert self.groups is not None
        q_len, s_len = self.query.shape[2], self.keys
        if q_len == 1 and self.groups.offset is None and self.mask is not None:  # a decode step sees all keys so far
            seen = self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min
            real = (self.groups.labels != int(Label.PADDING))[:, None, None, :]
            return ((seen & real).sum(-1)[:, 0] - 1).clamp(min=0).expand(self.query.shape[0], 1)
        offset = s_len - q_len if self.groups.offset is None else self.groups.offset
        stop = q_len if stop is None else stop
        found = places(self.groups.labels)[:, offset + start : offset + stop]
        return found if self.groups.before is None else found + self.groups.before[:, None]

    @property
    def head_scales(self) -> list[tuple[int, HeadScale]]:
        return [(n, e) for n, e in enumerate(self.edits) if isinstance(e, HeadScale)]


@dataclass(frozen=True, eq=False)
class Attended:
    """Outputs of grouped attention.

    Args:
        output: [B, H, L, D] in the query's dtype.
        masses: Float32[B, H, L or 1, 8], attention mass per label, or None.
        fired: Int64[len(edits), 2]: how many (batch, head, row) places the edit changed, and how many it looked at.
        backend: name of the backend that served the call.
        reason: why a preferred backend did not serve it; "" when the first choice did.
    """

    output: Tensor
    masses: Tensor | None
    fired: Tensor
    backend: str
    reason: str = ""


def additive_mask(call: AttentionCall, start: int = 0, stop: int | None = None) -> Tensor | None:
    """Rows start:stop of the mask as float32, 0 or -inf, broadcastable to [B, H, rows, S]; None when all is allowed."""
    q_len, s_len = call.query.shape[2], call.keys
    stop = q_len if stop is None else stop
    if call.mask is None:
        if not call.is_causal or q_len == 1:
            return None
        rows = torch.arange(start, stop, device=call.query.device)[:, None]
        hidden = torch.arange(s_len, device=call.query.device)[None, :] > rows
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))[None, None]
    mask = call.mask if call.mask.shape[-2] == 1 else call.mask[..., start:stop, :]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    # Models write "hidden" as the smallest finite number of their dtype; to us it is hidden all the same.
    low = torch.finfo(mask.dtype).min
    return mask.float().masked_fill(mask <= low, float("-inf"))


def apply_head_scales(call: AttentionCall, output: Tensor, fired: Tensor) -> Tensor:
    """Replace and multiply head outputs, and count the heads that change."""
    b, h, q_len, _ = call.query.shape
    for n, mean in enumerate(call.edits):
        if isinstance(mean, HeadMean):
            output = mean(output)
            fired[n, 0] = mean.heads.expand(b, h).sum() * q_len
            fired[n, 1] = b * h * q_len
    for n, edit in call.head_scales:
        scale = edit.scale.to(output.device)
        if scale.shape not in ((h,), (b, h)):
            raise ValueError(f"HeadScale.scale {tuple(scale.shape)}: expected [{h}] or [{b}, {h}] (query heads)")
        scale = scale.expand(b, h)
        output = output * scale.to(output.dtype)[:, :, None, None]
        fired[n, 0] = (scale != 1).sum() * q_len
        fired[n, 1] = b * h * q_len
    return output
