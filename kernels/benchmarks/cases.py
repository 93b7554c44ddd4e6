"""What is measured: attention calls with their bytes, FLOPs and floor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mmfix_kernels import AttentionCall, Group, KeyGroups, Label, MassGate, MassMove, Rows, ScoreEdit
from mmfix_kernels.edits import Edit

GATE = MassGate(group=Group.IMAGE, min_mass=0.2, part=Group.IMAGE_SINK, max_share=0.5)
EDITS: dict[str, tuple[Edit, ...]] = {
    "none": (),
    "var": (MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.6, rows=Rows.AFTER_IMAGE, gate=GATE),),
    "pai": (ScoreEdit(group=Group.IMAGE, abs_gain=0.5, rows=Rows.LAST),),
}
IMAGE_KEYS = 576  # a LLaVA-1.5 image
SYSTEM_KEYS = 35


@dataclass(frozen=True)
class Case:
    """One attention shape with one edit."""

    phase: str  # "prefill" or "decode"
    edit: str
    keys: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 32
    width: int = 128
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        shape = f"b{self.batch} h{self.heads}/{self.kv_heads} s{self.keys} d{self.width} {self.dtype}"
        return f"{self.phase} {self.edit} {shape}"

    @property
    def rows(self) -> int:
        return self.keys if self.phase == "prefill" else 1

    def bytes(self) -> int:
        """Every input read once, the output written once."""
        size = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        elements = 2 * self.heads * self.rows + 2 * self.kv_heads * self.keys
        return self.batch * (elements * self.width * size + self.keys)

    def flops(self) -> int:
        """Two products of the visible (row, key) pairs."""
        pairs = self.keys * (self.keys + 1) // 2 if self.phase == "prefill" else self.keys
        return 4 * self.batch * self.heads * pairs * self.width

    def call(self, device: torch.device, seed: int) -> AttentionCall:
        """Random tensors; a system prompt, one image with a few sinks, then text."""
        random = torch.Generator(device=device).manual_seed(seed)
        dtype = getattr(torch, self.dtype)

        def draw(heads: int, length: int) -> torch.Tensor:
            shape = (self.batch, length, heads, self.width)  # as a model lays them out
            return torch.randn(shape, generator=random, device=device, dtype=dtype).transpose(1, 2)

        labels = torch.zeros(self.batch, self.keys, dtype=torch.int8, device=device)
        image_end = min(SYSTEM_KEYS + IMAGE_KEYS, self.keys - 1)
        labels[:, :SYSTEM_KEYS] = int(Label.SYSTEM)
        labels[:, 0] = int(Label.TEXT_SINK)
        labels[:, SYSTEM_KEYS:image_end] = int(Label.IMAGE)
        labels[:, SYSTEM_KEYS + 20 : image_end : 150] = int(Label.IMAGE_SINK)
        groups = KeyGroups.plain(labels)
        if self.phase == "prefill":
            at = torch.arange(self.keys, device=device).expand(self.batch, self.keys)
            rows = {Rows.ALL: None, Rows.AFTER_IMAGE: at >= image_end, Rows.LAST: at >= self.keys - 1}
            first = {Rows.ALL: 0, Rows.AFTER_IMAGE: image_end, Rows.LAST: self.keys - 1}
            groups = KeyGroups(labels=labels, rows=rows, first=first)
        key, value = draw(self.kv_heads, self.keys).contiguous(), draw(self.kv_heads, self.keys).contiguous()
        return AttentionCall(
            query=draw(self.heads, self.rows), key=key, value=value, is_causal=self.phase == "prefill", groups=groups,
            edits=EDITS[self.edit],
        )  # fmt: skip


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The cases of a device. A CPU gets small float32 shapes: only ratios between backends make sense there."""
    if device.type == "cpu":
        for keys in (640,) if quick else (640, 2048):
            for edit in ("none", "var", "pai"):
                yield Case("decode", edit, keys, heads=8, kv_heads=8, width=64, dtype="float32")
                if keys == 640 or not quick:
                    yield Case("prefill", edit, keys, heads=8, kv_heads=8, width=64, dtype="float32")
        return
    for edit in ("none", "var", "pai"):
        for keys in (640, 4096) if quick else (640, 2048, 4096, 8192, 16384):
            yield Case("decode", edit, keys)
            yield Case("prefill", edit, keys)
        if not quick:
            yield Case("decode", edit, 8192, batch=8)
            yield Case("decode", edit, 4096, heads=28, kv_heads=4)
            yield Case("prefill", edit, 4096, heads=28, kv_heads=4)
            yield Case("prefill", edit, 640, batch=8)
