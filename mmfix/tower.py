"""One attention call of a vision tower, with its map replaced.

Towers differ in what one call holds: a picture per batch row (CLIP, SigLIP, InternVL), one picture or window per call
(Qwen-VL, GLM-4V), all pictures in one row behind a block mask (Pixtral), or pictures with filler patches (Idefics,
Llama 3.2 Vision). Here each set of patches that see each other is a map of its own, so a map never depends on what
else is encoded in the same call. A resampler's calls (Q-Former, perceiver) are served too: its queries look at patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmfix_kernels import AttentionCall, KeyGroups, Label, MapReplacement, grouped_attention


def plain(inputs: dict[str, Any], backend: str | None) -> Tensor:
    """[B, H, L, D]: the call as the model means it."""
    return grouped_attention(AttentionCall(**inputs), backend).output


def replaced(maps: MapReplacement, inputs: dict[str, Any], backend: str | None) -> Tensor:
    """[B, H, L, D]: the call with `maps` put in place.

    A patch that does not see itself is filler and keeps its own map.
    """
    mask = inputs["mask"]
    if mask is None or bool(_seen(mask).all()):
        return _whole(maps, {**inputs, "mask": None}, backend)
    output = plain(inputs, backend)
    seen = _seen(mask)
    for b in range(output.shape[0]):
        for members, keys in _sets(seen[b if seen.shape[0] > 1 else 0].any(0)):
            part = {name: inputs[name][b : b + 1, :, keys] for name in ("key", "value")}
            rows = keys if seen.shape[-1] == seen.shape[-2] else members
            part["query"] = inputs["query"][b : b + 1, :, rows]
            found = _whole(maps, {**inputs, **part, "mask": None}, backend)
            output[b, :, members] = found[0, :, torch.isin(rows, members)]
    return output


def attention_map(inputs: dict[str, Any]) -> Tensor:
    """Float32[B, H, N, N]: the tower's own map of one call."""
    key = inputs["key"]
    identity = torch.eye(key.shape[2], device=key.device, dtype=torch.float32)
    whole = {name: inputs[name].float() for name in ("query", "key")}
    values = identity.expand(*key.shape[:2], *identity.shape)
    return grouped_attention(AttentionCall(**{**inputs, **whole, "value": values})).output


def cls_attention(inputs: dict[str, Any]) -> Tensor:
    """Float32[B, H, N]: how much the first token of each picture attends to the N others."""
    query, key = inputs["query"][:, :, :1].float(), inputs["key"].float()
    call = AttentionCall(**inputs)
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2) * call.factor
    found: Tensor = scores.softmax(-1)[:, :, 0, 1:]
    return found


def has_class_token(module: torch.nn.Module) -> bool:
    """Whether a vision tower has a class token beside its patches."""
    return any(name.rpartition(".")[2] in ("class_embedding", "cls_token") for name, _ in module.named_parameters())


def _whole(maps: MapReplacement, inputs: dict[str, Any], backend: str | None) -> Tensor:
    key = inputs["key"]
    labels = torch.full((key.shape[0], key.shape[2]), int(Label.IMAGE), dtype=torch.int8, device=key.device)
    groups = KeyGroups.plain(labels)
    if inputs["query"].shape[2] != key.shape[2]:  # a resampler's queries are numbered by themselves
        groups = replace(groups, offset=0)
    call = AttentionCall(**{**inputs, "is_causal": False}, groups=groups, edits=[maps])
    return grouped_attention(call, backend).output


def _seen(mask: Tensor) -> Tensor:
    """Bool[B or 1, H or 1, L, S] from a Bool or additive mask."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _sets(seen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(members, keys): rows that see the same `keys` (patches: themselves among them), from Bool[L, S]."""
    square = seen.shape[-1] == seen.shape[-2]
    left = seen.diagonal().clone() if square else seen.any(-1)
    while bool(left.any()):
        keys = seen[int(left.int().argmax())]
        members = left & (seen == keys).all(-1)
        left &= ~members
        yield members.nonzero().flatten(), keys.nonzero().flatten()
