"""What is measured: attention calls with their bytes, FLOPs and floor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mmfix_kernels import (
    AttentionCall,
    Group,
    KeyGroups,
    Label,
    MapReplacement,
    MassGate,
    MassMove,
    Rows,
    ScoreEdit,
)
from mmfix_kernels.edits import Edit

GATE = MassGate(group=Group.IMAGE, min_mass=0.2, part=Group.IMAGE_SINK, max_share=0.5)
EDITS: dict[str, tuple[Edit, ...]] = {
    "none": (),
    "var": (MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.6, rows=Rows.AFTER_IMAGE, gate=GATE),),
    "pai": (ScoreEdit(group=Group.IMAGE, abs_gain=0.5, rows=Rows.LAST),),
    "uniform": (MapReplacement(kind="uniform"),),
    "random": (MapReplacement(kind="random"),),
    "reversed": (MapReplacement(kind="reversed"),),
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
    branches: int = 1  # batch rows per prompt that share all keys but the newest 32

    @property
    def name(self) -> str:
        shape = f"b{self.batch} h{self.heads}/{self.kv_heads} s{self.keys} d{self.width} {self.dtype}"
        shared = f" r{self.branches}" if self.branches > 1 else ""
        return f"{self.phase} {self.edit} {shape}{shared}"

    @property
    def rows(self) -> int:
        return self.keys if self.phase == "prefill" else 1

    @property
    def own_keys(self) -> int:
        """Keys that each branch has for itself."""
        return self.keys if self.branches == 1 else 32

    def bytes(self) -> int:
        """Every input read once, the output written once; a shared prefix is read once for its branches."""
        size = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        keys = self.branches * self.own_keys + (self.keys - self.own_keys)
        elements = 2 * self.heads * self.rows * self.branches + 2 * self.kv_heads * keys
        return self.batch * (elements * self.width * size + keys)

    def scores(self) -> int:
        """Entries of the whole map."""
        return self.batch * self.branches * self.heads * self.rows * self.keys

    def size(self) -> dict[str, int]:
        """The numbers of a record."""
        return {"bytes": self.bytes(), "flops": self.flops(), "keys": self.keys, "batch": self.batch}

    def flops(self) -> int:
        """Two products of the visible (row, key) pairs."""
        pairs = self.keys * (self.keys + 1) // 2 if self.phase == "prefill" else self.keys
        return 4 * self.batch * self.branches * self.heads * pairs * self.width

    def call(self, device: torch.device, seed: int) -> AttentionCall:
        """Random tensors; a system prompt, one image with a few sinks, then text."""
        random = torch.Generator(device=device).manual_seed(seed)
        dtype, items = getattr(torch, self.dtype), self.batch * self.branches

        def draw(batch: int, heads: int, length: int) -> torch.Tensor:
            shape = (batch, length, heads, self.width)  # as a model lays them out
            return torch.randn(shape, generator=random, device=device, dtype=dtype).transpose(1, 2)

        key, value = (draw(items, self.kv_heads, self.own_keys).contiguous() for _ in range(2))
        prefix: list[torch.Tensor | None] = [None, None]
        if self.branches > 1:
            prefix = [draw(self.batch, self.kv_heads, self.keys - self.own_keys).contiguous() for _ in range(2)]
        return AttentionCall(
            query=draw(items, self.heads, self.rows), key=key, value=value, prefix_key=prefix[0],
            prefix_value=prefix[1], is_causal=self.phase == "prefill", groups=self.groups(device),
            edits=EDITS[self.edit],
        )  # fmt: skip

    def groups(self, device: torch.device) -> KeyGroups:
        """Labels of a prompt; rows after the image, and the last one."""
        items = self.batch * self.branches
        labels = torch.zeros(items, self.keys, dtype=torch.int8, device=device)
        image_end = min(SYSTEM_KEYS + IMAGE_KEYS, self.keys - 1)
        labels[:, :SYSTEM_KEYS] = int(Label.SYSTEM)
        labels[:, 0] = int(Label.TEXT_SINK)
        labels[:, SYSTEM_KEYS:image_end] = int(Label.IMAGE)
        labels[:, SYSTEM_KEYS + 20 : image_end : 150] = int(Label.IMAGE_SINK)
        if self.phase == "decode":
            return KeyGroups.plain(labels)
        at = torch.arange(self.keys, device=device).expand(items, self.keys)
        rows = {Rows.ALL: None, Rows.AFTER_IMAGE: at >= image_end, Rows.LAST: at >= self.keys - 1}
        first = {Rows.ALL: 0, Rows.AFTER_IMAGE: image_end, Rows.LAST: self.keys - 1}
        return KeyGroups(labels=labels, rows=rows, first=first)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The cases of a device. A CPU gets small float32 shapes: only ratios between backends make sense there."""
    if device.type == "cpu":
        for keys in (640,) if quick else (640, 2048):
            for edit in EDITS:
                for phase in ("decode", "prefill"):
                    yield Case(phase, edit, keys, heads=8, kv_heads=8, width=64, dtype="float32")
        yield Case("decode", "var", 640, heads=8, kv_heads=8, width=64, dtype="float32", branches=2)
        return
    yield from first_on_a_gpu()
    if quick:
        return
    for edit in ("none", "var", "pai"):
        yield Case("decode", edit, 8192, batch=8)
    for keys in (2048, 8192, 16384):
        for edit in ("none", "var", "pai"):
            yield Case("decode", edit, keys)
            yield Case("prefill", edit, keys)
    for edit in ("none", "var", "pai"):
        yield Case("decode", edit, 4096, heads=28, kv_heads=4)
        yield Case("prefill", edit, 4096, heads=28, kv_heads=4)
        yield Case("prefill", edit, 640, batch=8)
    for edit in ("none", "var"):
        yield Case("decode", edit, 8192, batch=4, branches=2)


def first_on_a_gpu() -> Iterator[Case]:
    """A few cases of every kind, those first that the goals speak of: time may be short."""
    for keys in (4096, 640):
        for edit in ("var", "none", "pai"):
            yield Case("decode", edit, keys)
            yield Case("prefill", edit, keys)
    for edit in ("uniform", "random", "reversed"):
        yield Case("decode", edit, 4096)
        yield Case("prefill", edit, 4096)
    for edit in ("none", "var"):
        yield Case("decode", edit, 4096, branches=2)
