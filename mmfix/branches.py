"""Contrast branches: extra rows of one batch, and how their logits combine.

Row ``b*R + r`` is branch r of prompt b; branch 0 is the factual one. ``generate()`` sees one row per prompt: inputs are
expanded before the model's forward pass and the logits folded after it, so every decoding mode acts on mixed logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmfix.errors import MethodError
from mmfix_kernels import MapReplacement

VisionVariant = Literal["paper", "release"]


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionEdit:
    """A counterfactual look at the same picture.

    Args:
        maps: the map put in place of the vision tower's.
        variant: "paper" replaces the maps of `layers`; "release" leaves the tower alone and multiplies the features it
            hands to the projector by weights made from one map, as CausalMM's released code does.
        layers: tower layers, negative from the end.
    """

    maps: MapReplacement
    variant: VisionVariant = "paper"
    layers: tuple[int, ...] = (-2,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """One counterfactual row per prompt.

    Args:
        image: False removes the image tokens from the prompt (positions close up).
        vision: a changed look at the picture, or None.
        maps: a map put in place of the language model's, or None.
        layers: language layers in which it is put.
    """

    image: bool = True
    vision: VisionEdit | None = None
    maps: MapReplacement | None = None
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the logits of the branches combine, and which tokens stay plausible.

    ``z = sum_r weights[r] * l_r``, then ``z_v = -inf`` unless ``l_v >= log(beta) + max l`` on the factual logits l (the
    adaptive plausibility cut, in float32, before temperature and warpers).

    Args:
        weights: one per branch, the factual one first; they sum to 1, so that equal branches change nothing.
        beta: of the plausibility cut, in (0, 1]; None for no cut.
        log_probs: combine log-probabilities instead of logits.
    """

    weights: tuple[float, ...]
    beta: float | None = None
    log_probs: bool = False

    def __post_init__(self) -> None:
        if abs(sum(self.weights) - 1.0) > 1e-6:
            raise MethodError(f"mix weights {self.weights} sum to {sum(self.weights):g}; they must sum to 1")
        if self.beta is not None and not 0.0 < self.beta <= 1.0:
            raise MethodError(f"plausibility cut beta={self.beta}: give a number in (0, 1], or None")

    def __call__(self, logits: Tensor) -> Tensor:
        """[B, R, k, V] → [B, k, V] in the same dtype."""
        branches = logits.float()
        if self.log_probs:
            branches = branches.log_softmax(-1)
        factual = branches[:, 0]
        mixed = factual * self.weights[0]
        for r, weight in enumerate(self.weights[1:], start=1):
            mixed = mixed + weight * branches[:, r]
        mixed = mixed.masked_fill(factual.isneginf(), float("-inf"))  # never a difference of two infinities
        if self.beta is not None:
            keep = factual >= factual.amax(-1, keepdim=True) + math.log(self.beta)
            mixed = mixed.masked_fill(~keep, float("-inf"))
        return mixed.to(logits.dtype)


def contrast(gamma: float, branches: int = 1, beta: float | None = None) -> Mix:
    """``(1 + n*gamma) l - gamma * sum l_r`` over n branches: CausalMM, VCD and most of their kin."""
    return Mix(weights=(1.0 + branches * gamma, *[-gamma] * branches), beta=beta)


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

    def fold(self, output: Any, mix: Mix, has_image: Tensor) -> tuple[Any, Tensor]:
        """A model output whose logits are mixed, and counts of positions changed and seen.

        Args:
            has_image: Bool[B]; a prompt without an image keeps its factual logits.
        """
        logits = output.logits if hasattr(output, "logits") else output[0]
        branches = logits.view(-1, self.count, *logits.shape[1:])
        factual = branches[:, 0]
        mixed = torch.where(has_image[:, None, None], mix(branches), factual)
        changed = (mixed != factual).any(-1)
        counts = torch.stack([changed.sum(), changed.new_tensor(changed.numel(), dtype=torch.int64)])
        if hasattr(output, "logits"):
            output.logits = mixed
            return output, counts
        return (mixed, *output[1:]), counts


def drop_image(ids: Tensor, valid: Tensor, image: Tensor, rows: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Prompts of `rows` without their image tokens, pushed to the right; the others as they are.

    Args:
        ids, valid, image: [N, T]; rows: Bool[N]; pad: id put in the freed places.

    Returns:
        ids and valid, both [N, T].
    """
    keep = valid & ~image
    order = torch.argsort(keep.int(), dim=-1, stable=True)
    short_valid = keep.gather(1, order)
    short = ids.gather(1, order).masked_fill(~short_valid, pad)
    chosen = rows[:, None]
    return torch.where(chosen, short, ids), torch.where(chosen, short_valid, valid)


class CacheRows:
    """Makes a cache's batch operations, which count prompts, act on rows. Undone by :meth:`restore`."""

    _INDEXED = ("reorder_cache", "batch_select_indices")

    def __init__(self, cache: Any, count: int) -> None:
        self.cache, self.count = cache, count
        for name in self._INDEXED:
            original = getattr(type(cache), name, None)
            if original is not None:
                setattr(cache, name, self._on_rows(original))

    def _on_rows(self, original: Any) -> Any:
        def act(index: Tensor) -> Any:
            rows = index[:, None] * self.count + torch.arange(self.count, device=index.device)
            return original(self.cache, rows.flatten())

        return act

    def restore(self) -> None:
        for name in self._INDEXED:
            self.cache.__dict__.pop(name, None)
