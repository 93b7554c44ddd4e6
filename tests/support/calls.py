"""Random attention calls for the kernel tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfix_kernels import AttentionCall, Group, HeadScale, KeyGroups, MassGate, MassMove, Rows, ScoreEdit

BACKENDS = ("reference", "sdpa")


def groups(batch: int, q_len: int, s_len: int, seed: int = 0, labels: Tensor | None = None) -> KeyGroups:
    """Random labels; AFTER_IMAGE rows start at a third of the rows (later in later batch rows), LAST is the last."""
    generator = torch.Generator().manual_seed(seed)
    if labels is None:
        labels = torch.randint(0, 6, (batch, s_len), generator=generator).to(torch.int8)
    row = torch.arange(q_len)[None, :].expand(batch, -1)
    starts = torch.arange(batch)[:, None] + q_len // 3
    after, last = row >= starts, row == q_len - 1
    first = int(after.any(0).int().argmax()) if bool(after.any()) else q_len
    return KeyGroups(
        labels=labels,
        rows={Rows.ALL: None, Rows.AFTER_IMAGE: after, Rows.LAST: last, Rows.GENERATED: last & (q_len > 1)},
        first={Rows.ALL: 0, Rows.AFTER_IMAGE: first, Rows.LAST: q_len - 1, Rows.GENERATED: q_len - 1},
    )


def causal(q_len: int, s_len: int, batch: int = 1, pad: int = 0) -> Tensor:
    """Bool[batch, 1, L, S]: causal with the rows at the end of the keys; batch row 0 has `pad` keys of left padding."""
    mask = torch.ones(q_len, s_len, dtype=torch.bool).tril(s_len - q_len).expand(batch, 1, -1, -1).clone()
    mask[0, :, :, :pad] = False
    return mask


def random_call(
    q_len: int = 7, s_len: int = 63, width: int = 8, heads: int = 4, kv_heads: int = 4, batch: int = 2, seed: int = 0,
    dtype: torch.dtype = torch.float32, **options: Any,
) -> AttentionCall:  # fmt: skip
    """A call with random tensors and groups; `options` go to the call (a mask is causal unless given)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 1.5).to(dtype)

    tensors = {
        "query": draw(batch, heads, q_len, width),
        "key": draw(batch, kv_heads, s_len, width),
        "value": draw(batch, kv_heads, s_len, width),
    }
    if "mask" not in options and not options.get("is_causal"):
        options["mask"] = causal(q_len, s_len, batch) if q_len <= s_len else torch.ones(1, 1, q_len, s_len).bool()
    options.setdefault("groups", groups(batch, q_len, s_len, seed))
    return AttentionCall(**{**tensors, **options})


GATE = MassGate(group=Group.IMAGE, min_mass=0.2, part=Group.IMAGE_SINK, max_share=0.5)
VAR_MOVE = MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.6, rows=Rows.AFTER_IMAGE, gate=GATE)


def edit_sets(heads: int = 4, batch: int = 2) -> dict[str, list[Any]]:
    """Named lists of edits that cover the vocabulary."""
    scale = torch.linspace(0.0, 2.0, heads)
    return {
        "plain": [],
        "bias": [ScoreEdit(group=Group.IMAGE, bias=0.7)],
        "gain": [ScoreEdit(group=Group.IMAGE, rows=Rows.AFTER_IMAGE, gain=1.15)],
        "abs-gain": [ScoreEdit(group=Group.IMAGE, rows=Rows.LAST, abs_gain=0.5, heads=(0,))],
        "hide": [ScoreEdit(group=Group.SYSTEM | Group.IMAGE_SINK, bias=float("-inf"))],
        "move": [MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.6)],
        "move-all": [MassMove(source=Group.SYSTEM, target=Group.IMAGE, share=1.0, rows=Rows.AFTER_IMAGE, heads=(0,))],
        "var": [VAR_MOVE],
        "two-moves": [VAR_MOVE, MassMove(source=Group.GENERATED, target=Group.IMAGE, share=0.3, rows=Rows.LAST)],
        "heads": [HeadScale(scale=scale)],
        "heads-by-row": [HeadScale(scale=torch.stack([scale, 1 - scale])[:batch])],
        "everything": [
            HeadScale(scale=scale), VAR_MOVE, ScoreEdit(group=Group.IMAGE, gain=1.1, abs_gain=0.3, bias=0.2),
            ScoreEdit(group=Group.SYSTEM, rows=Rows.LAST, gain=0.9, bias=-1.0),
        ],
    }  # fmt: skip
