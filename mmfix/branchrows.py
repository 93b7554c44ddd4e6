"""Rows of a branched batch: expanding, folding, and the operations of a cache that count prompts.

Row ``b*R + r`` is branch r of prompt b; branch 0 is the factual one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfix.branches import Branch
from mmfix.mixing import Mix


class Rows:
    """The rows of a branched batch: how many, and which belong to which branch."""

    def __init__(self, branches: tuple[Branch, ...]) -> None:
        self.branches = branches
        self.count = 1 + len(branches)

    def of(self, branch: int, batch: int, device: torch.device) -> Tensor:
        """Bool[B*R]: the rows of one branch."""
        return torch.arange(batch * self.count, device=device) % self.count == branch

    def without_image(self, batch: int, device: torch.device) -> Tensor:
        """Bool[B*R]: the rows whose prompt has no image tokens."""
        gone = torch.tensor([False, *(not b.image for b in self.branches)], device=device)
        return gone.repeat(batch)

    def expand(self, tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor.repeat_interleave(self.count, dim=dim)

    def fold(
        self,
        output: Any,
        mix: Mix,
        has_image: Tensor,
        length: int,
        beyond: int = 0,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Any, Tensor]:
        """A model output whose logits are mixed, and counts of positions changed and seen.

        Args:
            has_image: Bool[B]; a prompt without an image keeps its factual logits.
            length: positions that were asked for; rows with a longer prompt have more.
            beyond: generated tokens up to the output's last position; negative inside the prompt.
            beside: gives further logits [B, n, k, V] from the output's [B, k, V].
        """
        logits = output.logits if hasattr(output, "logits") else output[0]
        further = None if beside is None else beside(logits)[:, :, -length:]
        logits = logits[:, -length:]
        branches = logits.reshape(-1, self.count, *logits.shape[1:])
        branches = branches if further is None else torch.cat([branches, further], dim=1)
        factual = branches[:, 0]
        steps = None
        if mix.growth is not None:
            steps = torch.arange(beyond - factual.shape[1] + 1, beyond + 1, device=factual.device).clamp(min=0)
        mixed = torch.where(has_image[:, None, None], mix(branches, steps), factual)
        changed = mix.acts(branches, steps) & has_image[:, None]
        counts = torch.stack([changed.sum(), changed.new_tensor(changed.numel(), dtype=torch.int64)])
        if hasattr(output, "logits"):
            output.logits = mixed
            if getattr(output, "hidden_states", None) is not None:
                output.hidden_states = tuple(hidden[:: self.count] for hidden in output.hidden_states)
            return output, counts
        return (mixed, *output[1:]), counts


def trimmed(output: Any, length: int) -> Any:
    """A model output with the logits of its last `length` positions."""
    if hasattr(output, "logits"):
        output.logits = output.logits[:, -length:]
        return output
    return (output[0][:, -length:], *output[1:])


class CacheRows:
    """Makes a cache's batch operations, which count prompts, act on rows. Undone by :meth:`restore`."""

    _INDEXED = ("reorder_cache", "batch_select_indices")
    _ALL = (*_INDEXED, "batch_repeat_interleave", "crop")

    def __init__(self, cache: Any, count: int, longer: int = 0) -> None:
        """`longer`: tokens by which the rows' prompts are longer than the one that ``generate()`` knows."""
        self._cache = weakref.ref(cache)  # caches of finished generations are not kept alive
        self.count, self.longer = count, longer
        for name in self._INDEXED:
            original = getattr(type(cache), name, None)
            if original is not None:
                setattr(cache, name, self._on_rows(original))
        cache.batch_repeat_interleave = self._repeat
        if longer:
            cache.crop = self._crop

    @property
    def cache(self) -> Any:
        """The cache; None once nobody else holds it."""
        return self._cache()

    def _on_rows(self, original: Any) -> Any:
        def act(index: Tensor) -> Any:
            rows = index[:, None] * self.count + torch.arange(self.count, device=index.device)
            return original(self.cache, rows.flatten())

        return act

    def _repeat(self, repeats: int) -> None:
        keys = next(layer.keys for layer in self.cache.layers if layer.keys is not None)
        prompts = torch.arange(keys.shape[0] // self.count, device=keys.device)
        self.cache.batch_select_indices(prompts.repeat_interleave(repeats))

    def _crop(self, length: int) -> None:
        type(self.cache).crop(self.cache, length + self.longer if length > 0 else length)

    def restore(self) -> None:
        cache = self.cache
        if cache is None:
            return
        for name in self._ALL:
            cache.__dict__.pop(name, None)
        for layer in getattr(cache, "layers", ()):
            if (
                getattr(layer, "keys", None) is None
                or not layer.keys.numel()
                or getattr(layer, "is_compileable", False)
            ):
                continue
            layer.keys, layer.values = layer.keys[:: self.count], layer.values[:: self.count]
