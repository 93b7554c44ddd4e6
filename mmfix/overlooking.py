"""Image tokens that an early layer of a branch looks at are hidden from its later layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfix.selection import Overlooked
from mmfix_kernels import AttentionCall, Group, KeyGroups, row_weights

if TYPE_CHECKING:
    from mmfix.branchrows import Rows
    from mmfix.passes import Pass


class Overlooking:
    """What the choosing layer of the pass at hand found, for the layers after it."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.selects = {
            n: branch.select for n, branch in enumerate(rows.branches, start=1) if isinstance(branch.select, Overlooked)
        }
        self._hidden: dict[int, Tensor] = {}  # branch → Bool[B, 1, L, S], keys that its rows do not see
        self._offset = 0  # position of the first of these keys

    def masked(self, layer: int, inputs: dict[str, Any], groups: KeyGroups, current: Pass, last: Tensor) -> Any:
        """Inputs of one attention call, with what a branch overlooks hidden.

        Args:
            groups: labels of the call's keys.
            last: Int64[B*R], the last token of each prompt.
        """
        call = AttentionCall(**inputs)
        for number, select in self.selects.items():
            if layer == select.after - 1:
                one = slice(number, None, self.rows.count)
                image = groups.member(Group.IMAGE)[one]
                self._hidden[number] = _choose(select, _part(call, one), image, current, last[one])[:, None]
                self._offset = 0 if current.single else max(0, current.total - call.keys)
        hidden = [(n, self._hidden[n]) for n, select in self.selects.items() if layer >= select.after]
        if not hidden:
            return inputs
        return {**inputs, "mask": self._mask(call, hidden, current), "is_causal": False}

    def _mask(self, call: AttentionCall, hidden: list[tuple[int, Tensor]], current: Pass) -> Tensor:
        """[B*R, 1, L, S]: the call's mask in the form it had (Bool, or additive), with more hidden."""
        batch, _, length, _ = call.query.shape
        keys = call.keys
        mask = call.mask
        if mask is None:
            mask = torch.ones(length, keys, dtype=torch.bool, device=call.query.device)[None, None]
            mask = mask.tril(keys - length) if call.is_causal else mask
        base = mask.expand(batch, mask.shape[1], length, keys)
        closed = torch.zeros(batch, 1, length, keys, dtype=torch.bool, device=base.device)
        for number, found in hidden:
            if found.shape[-1] != keys:  # a sliding window keeps the tail of the keys, a fixed cache has more of them
                skipped = max(0, current.total - keys) - self._offset
                found = F.pad(found, (max(0, -skipped), max(0, keys + skipped - found.shape[-1])))
                found = found[..., max(0, skipped) :][..., :keys]
            closed[number :: self.rows.count] = found
        boolean = base.dtype == torch.bool
        changed = base.masked_fill(closed, False if boolean else torch.finfo(base.dtype).min)
        sees = changed if boolean else changed > torch.finfo(base.dtype).min
        return torch.where(sees.any(-1, keepdim=True), changed, base)  # a row is never left without a key

    def close(self) -> None:
        self._hidden = {}


def _part(call: AttentionCall, one: slice) -> AttentionCall:
    """The call of some of its batch rows."""
    mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[one]
    return AttentionCall(
        query=call.query[one], key=call.key[one], value=call.value[one], mask=mask, is_causal=call.is_causal,
        scale=call.scale, softcap=call.softcap,
    )  # fmt: skip


def _choose(select: Overlooked, call: AttentionCall, image: Tensor, current: Pass, last: Tensor) -> Tensor:
    """Bool[B, L, S]: image keys that each row does not see in later layers.

    A row of the prompt takes the choice of the prompt's last row, a generated one makes its own.
    """
    batch, _, length, _ = call.query.shape
    rows = torch.arange(length, device=image.device).expand(batch, -1)
    start = 0
    if not current.single:
        index = torch.maximum(rows, (last - current.past).clamp(max=length - 1)[:, None])
        start = int(index.amin())
    weights = row_weights(call, rows[:, start:]).mean(1)
    found = image[:, None] & ~select(weights, image[:, None])
    return found if current.single else found.gather(1, (index - start)[..., None].expand(-1, -1, found.shape[-1]))
