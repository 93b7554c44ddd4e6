"""DoLa: decoding by contrasting layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, chosen_layers
from mmfix.mixing import Mix
from mmfix.readouts import Readout, tied
from mmfix.registry import param, register

Divergence = Literal["jensen-shannon", "released"]


@dataclass(frozen=True, kw_only=True)
class LayerContrast(Mix):
    """The log-probabilities of the last layer less those of the early layer that is farthest from it.

    Args:
        alpha: weight of the early layer.
        divergence: how far layers are apart; see :class:`DoLa`.
    """

    alpha: float = 1.0
    divergence: Divergence = "jensen-shannon"

    def combined(self, logits: Tensor, steps: Tensor | None = None) -> Tensor:
        """Float32[B, k, V] of [B, 1 + n, k, V]: the model's logits, then those of n early layers."""
        found = logits.float().log_softmax(-1)
        mature, early = found[:, 0], found[:, 1:]
        index = self.chosen(mature, early)[:, None, :, None]
        premature = early.gather(1, index.expand(-1, -1, -1, early.shape[-1]))[:, 0]
        mixed = mature - self.alpha * premature
        return mixed.masked_fill(mature.isneginf(), float("-inf"))

    def chosen(self, mature: Tensor, early: Tensor) -> Tensor:
        """Int64[B, k]: the farthest layer, for every row and position; of equal ones the first.

        Args:
            mature: Float[B, k, V], early: Float[B, n, k, V], log-probabilities.
        """
        p, q = mature[:, None], early
        middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        if self.divergence == "released":
            distance = _divergence(middle, p) + _divergence(middle, q)
        else:
            distance = _divergence(p, middle) + _divergence(q, middle)
        return distance.argmax(1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler, sum over the last axis of ``p (log p - log q)``, from log-probabilities."""
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)


@register("dola", title="Decoding by Contrasting Layers", paper="arXiv:2309.03883", kind="contrast")
@dataclass(frozen=True, kw_only=True)
class DoLa(Method):
    """Subtract what an early layer would already have said.

    *DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models* (ICLR 2024, arXiv:2309.03883).
    With p_N the model's probabilities and p_m those read out after m layers, m in `layers`, at every position::

        M   = argmax_m JS(p_N, p_m)        JS(p, q) = (KL(p | r) + KL(q | r)) / 2,  r = (p + q) / 2
        z   = log p_N - alpha log p_M
        cut   z_i = -inf unless p_N,i >= beta max p_N

    One pass, and one more product with the output embeddings for every layer of `layers`. The layer is chosen for each
    row and position. Layers are numbered as hidden states are: 0 is the embeddings, m the input of layer m.

    The released code, and the form of it that transformers once had, reads early layers out without the final norm
    (``norm=False``), takes the divergences the other way round, ``KL(r | p)`` (``divergence="released"``), and chooses
    one layer for the whole batch by its mean. Its relative_top is `beta`; its layers are the even ones, of which the
    embeddings are left out where they are tied to the output, since they only say the token over again.

    A prompt without an image is left alone, as by every method here, though the equation knows no image.

    Args:
        layers: layers that may be subtracted; None takes the even ones, as released.
        alpha: weight of the early layer, from 0; 0 reads nothing out and leaves the cut.
        beta: plausibility cut, in (0, 1].
        divergence: "jensen-shannon", or "released".
        norm: whether early layers go through the final norm.

    Raises:
        MethodError: a value out of range, or a layer that the model does not have.
        UnsupportedModel: the model's logits are not its last state through norm and output embeddings.
    """

    layers: tuple[int, ...] | None = param(None, "layers that may be subtracted; empty = the even ones")
    alpha: float = param(1.0, "weight of the early layer", 0.0, 2.0)
    beta: float = param(0.1, "plausibility cut", 0.0, 1.0)
    divergence: Literal["jensen-shannon", "released"] = param("jensen-shannon", "how far layers are apart")
    norm: bool = param(True, "final norm on early layers")

    def __post_init__(self) -> None:
        self.check("alpha", 0.0, 100.0)
        self.check("beta", 1e-9, 1.0)
        if self.divergence not in ("jensen-shannon", "released"):
            raise MethodError(f"dola.divergence={self.divergence!r}: choose 'jensen-shannon' or 'released'")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))
            if not self.layers:
                raise MethodError("dola.layers is empty: give at least one layer, or None for the even ones")

    def prepare(self, family: Family) -> DoLa:
        if not self.alpha:
            return self
        count = family.num_layers
        default = [n for n in range(0, count, 2) if n or count == 1 or not tied(family)] or [count - 1]
        return dataclasses.replace(self, layers=chosen_layers(self, default, count))

    def readouts(self, family: Family) -> Sequence[Readout]:
        return [Readout(layer=n, norm=self.norm) for n in self.layers or ()] if self.alpha else []

    def mix(self) -> Mix:
        if not self.alpha:
            return Mix(weights=(1.0,), beta=self.beta)
        weights = (1.0, *[0.0] * len(self.layers or ()))
        return LayerContrast(
            weights=weights, beta=self.beta, log_probs=True, alpha=self.alpha, divergence=self.divergence
        )
