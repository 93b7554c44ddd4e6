"""Attention in which the order of a prompt's segments is chosen per head and query, not read from the prompt.

The model is given position 0 for every token of the prompt, so that its rotary embedding leaves queries and keys as
they are (generated tokens get 1, 2, …), and this module rotates them. A key at position a and a query at b meet in
``q^T R(a - b) k``: moving a whole segment of keys back by `shift` is the same as moving the query on by it, so that no
key is rotated more than once, and nothing of the size [heads, queries, keys, width] is ever made.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfix.errors import UnsupportedModel
from mmfix.spans import TokenSpans

if TYPE_CHECKING:
    from mmfix.families import Family

Bounds = tuple[tuple[int, int], ...]  # start and stop of each segment, as places in the padded prompt
_STATIC = ("default", "linear", "llama3", "yarn", "proportional")  # rotary embeddings that do not depend on the length


@dataclass(frozen=True, eq=False)
class Reorder:
    """Segments of a batch of prompts whose order is no order.

    Args:
        segments: per prompt, contiguous segments; fewer than two have nothing to reorder.
        valid: Bool[B, T].
    """

    segments: tuple[Bounds, ...]
    valid: Tensor


def plain_positions(spans: TokenSpans) -> Tensor:
    """Int64[B, T]: tokens numbered from 0, padding left out."""
    return (spans.valid.long().cumsum(-1) - 1).clamp(min=0)


class Rotary:
    """The rotary embedding of one attention layer, for positions of our own.

    Raises:
        UnsupportedModel: the layer's embedding is not one of halves turned by an angle proportional to the position.
    """

    def __init__(self, family: Family, module: nn.Module) -> None:
        self.embed: Any = getattr(family.decoder, "rotary_emb", None)
        functions = vars(sys.modules[type(module).__module__])
        halves = functions.get("rotate_half")
        kind = getattr(self.embed, "rope_type", "default")
        turned = None if halves is None else halves(torch.arange(4.0)).tolist()
        if self.embed is None or turned != [-2.0, -3.0, 0.0, 1.0] or not (isinstance(kind, str) and kind in _STATIC):
            raise UnsupportedModel(
                f"{family.name}: {type(module).__name__} has no rotary embedding that can be taken off its keys "
                f"(rotary_emb {type(self.embed).__name__}, {kind!r}); use another method or model"
            )
        if "layer_type" in inspect.signature(self.embed.forward).parameters:
            raise UnsupportedModel(f"{family.name}: rotary embeddings differ from layer to layer; use another method")

    def __call__(self, tensor: Tensor, positions: Tensor) -> Tensor:
        """[H, L, D] in float32, turned on by positions Int64[L] or [H, L], without the embedding's scale."""
        shape = positions.shape
        cos, sin = self.embed(tensor, positions.reshape(1, -1))
        size = (cos.square() + sin.square()).sqrt()
        cos, sin = (x.float().div(size.float()).reshape(*shape, -1) for x in (cos, sin))
        width = cos.shape[-1]
        turned, rest = tensor[..., :width], tensor[..., width:]
        half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
        return torch.cat([turned * cos + half * sin, rest], dim=-1)


def attend(call: dict[str, Any], plan: Reorder, rotary: Rotary, past: int, total: int) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, L, D] of query rows past: of `total` tokens, and Int64[2] of the places changed and seen.

    Args:
        call: query [B, H, L, D], key and value [B, H_kv, S, D], scale and softcap of the attention call.
    """
    query, key, value = call["query"], call["key"][:, :, :total], call["value"][:, :, :total]
    copies = query.shape[0] // len(plan.segments)  # beams repeat the prompts
    outputs, changed = [], 0
    for n in range(query.shape[0]):
        bounds = plan.segments[n // copies]
        row = _Row(bounds, plan.valid[n // copies], past, total, rotary)
        repeats = query.shape[1] // key.shape[1]
        k, v = (x[n].float().repeat_interleave(repeats, 0) for x in (key, value))
        outputs.append(row.attend(query[n].float(), k, v, call))
        changed += row.touched * query.shape[1] if len(bounds) > 1 else 0
    output = torch.stack(outputs).to(query.dtype)
    return output, torch.tensor([changed, query.shape[0] * query.shape[1] * query.shape[2]], device=query.device)


class _Row:
    """One prompt's tokens up to `total`, and what its query rows past: see where."""

    def __init__(self, bounds: Bounds, valid: Tensor, past: int, total: int, rotary: Rotary) -> None:
        self.rotary, self.bounds = rotary, bounds
        device, prompt = valid.device, valid.shape[0]
        self.valid = torch.ones(total, dtype=torch.bool, device=device)
        self.valid[:prompt] = valid[:total]
        place = torch.arange(total, device=device)
        self.given = (place - (prompt - 1)).clamp(min=0)  # the positions that the model rotated by
        self.segment = torch.full((total,), -1, device=device)
        self.position = (self.valid.long().cumsum(-1) - 1).clamp(min=0)
        self.lengths = torch.tensor([stop - start for start, stop in bounds], device=device)
        end = int(self.position[bounds[-1][1] - 1]) + 1 if bounds else 0
        for n, (start, stop) in enumerate(bounds):  # every segment ends where the last one does
            self.segment[start:stop] = n
            self.position[start:stop] = torch.arange(end - (stop - start), end, device=device)
        self.rows = slice(past, total)
        after = place >= (bounds[-1][1] if bounds else 0)
        own = self.segment[self.rows, None]
        causal = place[None, :] <= place[self.rows, None]
        self.seen = self.valid & (causal | ((own >= 0) & (self.segment[None, :] >= 0) & (own != self.segment[None, :])))
        self.ranked = (after | (self.segment >= 0))[self.rows] & self.valid[self.rows]  # rows that see segments
        self.touched = int(self.ranked.sum())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> Tensor:
        """[H, L, D] from query [H, L, D], key and value [H, S, D] as the model rotated them."""
        scale = query.shape[-1] ** -0.5 if call["scale"] is None else call["scale"]
        bare_query = self.rotary(query, -self.given[self.rows])
        bare_key = self.rotary(key, -self.given)
        turned = self.rotary(bare_key, self.position)
        own = self.position[self.rows]
        scores = self.rotary(bare_query, own) @ turned.transpose(-1, -2)
        if len(self.bounds) > 1:
            shifts = self.shifts(bare_query @ bare_key.transpose(-1, -2) * scale)
            for n, (start, stop) in enumerate(self.bounds):
                moved = self.rotary(bare_query, own + shifts[..., n])
                scores[..., start:stop] = moved @ turned[:, start:stop].transpose(-1, -2)
        scores = scores * scale
        if call["softcap"] is not None:
            scores = call["softcap"] * torch.tanh(scores / call["softcap"])
        weights: Tensor = scores.masked_fill(~self.seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        return weights @ value

    def shifts(self, scores: Tensor) -> Tensor:
        """Int64[H, L, m]: how far each segment lies before the end, for each head and query row.

        Args:
            scores: [H, L, S] without positions.
        """
        count = len(self.bounds)
        own = self.segment[self.rows]
        inside = (self.segment >= 0) & (self.segment[None, :] != own[:, None]) & self.valid
        weights = scores.masked_fill(~inside, -torch.inf).softmax(-1).nan_to_num(0.0)
        found = torch.stack([weights[..., start:stop].mean(-1) for start, stop in self.bounds], dim=-1)  # [H, L, m]
        for n in range(count):
            rows = own == n
            if bool(rows.any()):  # the tokens of a segment agree on one order, in which it is the nearest itself
                agreed = found[:, rows].sum(1)
                agreed[:, n] = torch.inf
                found[:, rows] = agreed[:, None]
        order = found.argsort(dim=-1, descending=True, stable=True)
        sizes = self.lengths[order]
        before = sizes.cumsum(-1) - sizes
        shifts = torch.zeros_like(before).scatter(-1, order, before)
        return torch.where(self.ranked[None, :, None], shifts, 0)
