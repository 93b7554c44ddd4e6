"""How the logits of branches combine, and which tokens stay plausible."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfix.errors import MethodError


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A contrast that grows with the answer: at generated token t its strength is ``exp(rate (t + start)) - 1``.

    That is ``(1 - g) / g`` with ``g = exp(-rate (t + start))``, M3ID's weight (arXiv:2403.14003).

    Args:
        rate: growth per token, at least 0; 0 never contrasts.
        start: t of the first generated token; tokens of the prompt have it too.
        limit: the largest strength.
    """

    rate: float
    start: int = 0
    limit: float = 1e6

    def __call__(self, steps: Tensor) -> Tensor:
        """Float32[k] of Int64[k]: 0 for the first generated token (and before), 1 for the second, and so on."""
        return torch.expm1(self.rate * (steps.float() + self.start)).clamp(max=self.limit)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the logits of the branches combine, and which tokens stay plausible.

    ``z = sum_r weights[r] * l_r``, then ``z_v = -inf`` unless ``l_v >= log(beta) + max l`` on the factual logits l (the
    adaptive plausibility cut, in float32, before temperature and warpers). With a growth f, what the weights add to l
    is multiplied by f(t), t counting generated tokens: ``z = l + f(t) (sum_r weights[r] * l_r - l)``.

    Args:
        weights: one per branch (or readout), the factual one first; they sum to 1, so that equal branches change
            nothing.
        beta: of the plausibility cut, in (0, 1]; None for no cut.
        log_probs: combine log-probabilities instead of logits.
        growth: how strong the contrast is at each generated token; None means 1 at all of them.
        scale: factor on z, for a method whose weights do not sum to 1: greedy decoding does not see it.
    """

    weights: tuple[float, ...]
    beta: float | None = None
    log_probs: bool = False
    growth: Growth | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.scale < math.inf:
            raise MethodError(f"mix scale {self.scale}: give a number above 0")
        if abs(sum(self.weights) - 1.0) > 1e-6:
            raise MethodError(f"mix weights {self.weights} sum to {sum(self.weights):g}; they must sum to 1")
        if self.beta is not None and not 0.0 < self.beta <= 1.0:
            raise MethodError(f"plausibility cut beta={self.beta}: give a number in (0, 1], or None")

    def __call__(self, logits: Tensor, steps: Tensor | None = None) -> Tensor:
        """[B, R, k, V] → [B, k, V] in the same dtype.

        Args:
            logits: of every branch, at k positions.
            steps: Int64[k], number of the generated token that each position predicts, 0 for the first and in the
                prompt; needed where the contrast grows.
        """
        mixed = self.combined(logits, steps)
        if self.scale != 1.0:
            mixed = mixed * self.scale
        if self.cuts:
            mixed = mixed.masked_fill(self.implausible(logits), float("-inf"))
        # What half precision cannot hold, of a strong contrast: the largest is then put at 0, which changes no choice.
        peak = mixed.amax(-1, keepdim=True)
        mixed = torch.where(peak > torch.finfo(logits.dtype).max / 4, mixed - peak, mixed)
        return mixed.to(logits.dtype)

    @property
    def cuts(self) -> bool:
        """Whether some tokens are removed."""
        return self.beta is not None

    def implausible(self, logits: Tensor) -> Tensor:
        """Bool[B, k, V]: tokens that the cut removes."""
        assert self.beta is not None
        factual = logits[:, 0].float()
        if self.log_probs:
            factual = factual.log_softmax(-1)
        return factual < factual.amax(-1, keepdim=True) + math.log(self.beta)

    def combined(self, logits: Tensor, steps: Tensor | None = None) -> Tensor:
        """Float32[B, k, V]: the weighted sum alone."""
        branches = logits.float()
        if self.log_probs:
            branches = branches.log_softmax(-1)
        factual = branches[:, 0]
        mixed = factual * self.weights[0]
        for r, weight in enumerate(self.weights[1:], start=1):
            # What a branch excludes is no reason for what the factual row allows: it counts as the factual row does.
            mixed = mixed + weight * torch.where(branches[:, r].isneginf(), factual, branches[:, r])
        if self.growth is not None:
            if steps is None:
                raise MethodError("a contrast that grows needs the number of each generated token; give steps")
            strength = self.growth(steps)[:, None]  # 0 leaves the factual logits, also where they are infinite
            mixed = torch.where(strength == 0, factual, factual + strength * (mixed - factual))
        return mixed.masked_fill(factual.isneginf(), float("-inf"))  # never a difference of two infinities

    def acts(self, logits: Tensor, steps: Tensor | None = None) -> Tensor:
        """Bool[B, k]: positions that the branches change by more than rounding; without branches, that the cut does."""
        if len(self.weights) == 1:
            return (self.implausible(logits) if self.cuts else logits[:, 0].isnan()).any(-1)
        factual = logits[:, 0].float()
        if self.log_probs:
            factual = factual.log_softmax(-1)
        finite = factual.isfinite()
        scale = torch.where(finite, factual.abs(), 0.0).amax(-1, keepdim=True)
        change = torch.where(finite, (self.combined(logits, steps) - factual).abs(), 0.0)
        return (change > 1e-4 * scale).any(-1)


def contrast(gamma: float, branches: int = 1, beta: float | None = None) -> Mix:
    """``(1 + n*gamma) l - gamma * sum l_r`` over n branches: CausalMM, VCD and most of their kin."""
    return Mix(weights=(1.0 + branches * gamma, *[-gamma] * branches), beta=beta)


def guidance(gamma: float, beta: float | None = None) -> Mix:
    """``gamma (c - u) + u`` on log-probabilities, c factual and u the one branch: classifier-free guidance."""
    return Mix(weights=(gamma, 1.0 - gamma), beta=beta, log_probs=True)
