"""DeCo: dynamic correction decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, chosen_layers, in_proportion
from mmfix.mixing import Mix
from mmfix.readouts import Readout
from mmfix.registry import param, register


@dataclass(frozen=True, kw_only=True)
class Correction(Mix):
    """The model's logits plus those of the early layer that is surest of one of the model's candidates.

    Args:
        alpha: weight of the early layer.
        top_p, top_k: candidates; see :class:`DeCo`.
    """

    alpha: float = 0.6
    top_p: float = 0.9
    top_k: int = 20

    @property
    def cuts(self) -> bool:
        return True

    def implausible(self, logits: Tensor) -> Tensor:
        """Bool[B, k, V]: tokens that are no candidates."""
        probs, order = logits[:, 0].float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = probs.cumsum(-1) - probs  # a token is one as long as those before it do not hold the share
        ranks = torch.arange(probs.shape[-1], device=probs.device)
        enough = before >= self.top_p + (self.top_p == 1)  # of all, since sums are rounded
        found = (~enough & (ranks < self.top_k)) | (ranks == 0)
        return ~torch.zeros_like(found).scatter(-1, order, found)

    def combined(self, logits: Tensor, steps: Tensor | None = None) -> Tensor:
        """Float32[B, k, V] of [B, 1 + n, k, V]: the model's logits, then those of n early layers."""
        rows = logits.float()
        factual, early = rows[:, 0], rows[:, 1:]
        if not early.shape[1]:
            return factual
        surest, index = self.chosen(early, ~self.implausible(logits))
        correction = early.gather(1, index[:, None, :, None].expand(-1, -1, -1, early.shape[-1]))[:, 0]
        mixed = factual + self.alpha * surest[..., None] * correction
        return mixed.masked_fill(factual.isneginf(), float("-inf"))

    @staticmethod
    def chosen(early: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Float32[B, k], the largest probability of a candidate in any layer, and Int64[B, k], the first such layer.

        Args:
            early: logits [B, n, k, V]; candidates: Bool[B, k, V].
        """
        probs = early.softmax(-1).masked_fill(~candidates[:, None], 0.0).amax(-1)
        surest = probs.max(dim=1)
        return surest.values, surest.indices


@register("deco", title="Dynamic Correction Decoding", paper="arXiv:2410.11779", kind="contrast")
@dataclass(frozen=True, kw_only=True)
class DeCo(Method):
    """Add what the surest of some earlier layers would say.

    *MLLM can see? Dynamic Correction Decoding for Hallucination Mitigation* (ICLR 2025, arXiv:2410.11779). Earlier
    layers often see an object that the last ones talk themselves out of. With C the most likely tokens of the model
    until they hold `top_p`, at most `top_k`, and l_m, p_m logits and probabilities read out after m layers, m in
    `layers`, at every position::

        (M, P) = argmax, max over m in layers and i in C of p_m,i
        z      = l + alpha P l_M        z_i = -inf unless i is in C

    One pass, and one more product with the output embeddings for every layer of `layers`. Layer and candidates are
    those of each row and position, and the rule is the same under greedy decoding, beams and sampling. Layers are
    numbered as hidden states are: m is the input of layer m, read out through the final norm.

    The released code takes the largest probability over a whole batch, so that it serves a batch of one, and alpha 0.5
    or 0.6 by script. Users report that it nearly always answers yes on POPE: report the yes ratio beside accuracy.
    A prompt without an image is left alone.

    Args:
        alpha: weight of the early layer, from 0; 0 reads nothing out and leaves the candidates.
        top_p: probability that the candidates hold, in (0, 1].
        top_k: candidates at most, from 1.
        layers: layers that may be added; None takes those from 20 to 28 of 32, in proportion to the model's number.

    Raises:
        MethodError: a value out of range, or a layer that the model does not have.
        UnsupportedModel: the model's logits are not its last state through norm and output embeddings.
    """

    alpha: float = param(0.6, "weight of the early layer", 0.0, 2.0)
    top_p: float = param(0.9, "probability that the candidates hold", 0.0, 1.0)
    top_k: int = param(20, "candidates at most", 1, 1000)
    layers: tuple[int, ...] | None = param(None, "layers that may be added; empty = 20 to 28 of 32")

    def __post_init__(self) -> None:
        self.check("alpha", 0.0, 100.0)
        self.check("top_p", 1e-9, 1.0)
        self.check("top_k", 1, 10**9)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))
            if not self.layers:
                raise MethodError("deco.layers is empty: give at least one layer, or None for 20 to 28 of 32")

    def prepare(self, family: Family) -> DeCo:
        count = family.num_layers
        return dataclasses.replace(self, layers=chosen_layers(self, in_proportion(20, 29, count), count))

    def readouts(self, family: Family) -> Sequence[Readout]:
        return [Readout(layer=n) for n in self.layers or ()] if self.alpha else []

    def mix(self) -> Mix:
        weights = (1.0, *[0.0] * (len(self.layers or ()) if self.alpha else 0))
        return Correction(weights=weights, alpha=self.alpha, top_p=self.top_p, top_k=self.top_k)
