"""MemVR: memory-space visual retracing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, in_proportion, layer_numbers
from mmfix.registry import param, register
from mmfix.retracing import Retrace


@register("memvr", title="Memory-space Visual Retracing", paper="arXiv:2410.03577", kind="hidden edit")
@dataclass(frozen=True, kw_only=True)
class MemVR(Method):
    """Where a middle layer is uncertain of the next token, give the next layer's MLP the image tokens as a memory.

    *Look Twice Before You Answer: Memory-Space Visual Retracing for Hallucination Mitigation in Multimodal Large
    Language Models* (ICML 2025, arXiv:2410.03577). Layer by layer in the window, with p the probabilities of the ten
    likeliest tokens among themselves (final norm and language head on what the layer gives)::

        u_l = - sum_k p_k log p_k / log 10
        u_l > threshold, for the first time in this pass:
        MLP_{l+1}(x) <- (1 - ratio) MLP_{l+1}(x) + ratio s x V^T V

    with V [N, hidden] the image tokens as they enter the first layer and s such that both terms have the same mean
    magnitude. The last token of a prompt decides for the whole prompt; every generated token decides for itself. One
    pass per token, and one reading of the language head per layer of the window.

    The released code reads the head after every layer, writes V into the weights of the next MLP (so that two
    generations interact), adds the uncertainties of a batch up, and takes s over all tokens of a pass at once; here
    each prompt decides alone, s is taken token by token, and no weight is touched. The constants by which it scales V
    cancel in s. The paper's formula has the MLP's activation between V^T and V; the released code has none.

    Args:
        ratio: share of the image in the MLP's output, 0 to 1; 0 changes nothing.
        threshold: on the uncertainty, 0 to 1; 1 never acts.
        layers: layers after which uncertainty is read, none of them the last; None takes 6 to 15 of 32, in proportion.
        activation: put the model's activation between V^T and V, as the paper writes it.

    Raises:
        MethodError: a value out of range, or a layer that has none after it.
        MmfixError: a prompt in pieces.
        UnsupportedModel: the image is not part of the prompt, or the MLP cannot be reached.
    """

    ratio: float = param(0.12, "share of the image in the MLP's output", 0.0, 1.0)
    threshold: float = param(0.75, "uncertainty above which the image is looked at again", 0.0, 1.0)
    layers: tuple[int, ...] | None = param(None, "layers after which uncertainty is read; empty = 6 to 15 of 32")
    activation: bool = param(False, "the model's activation between keys and values")

    def __post_init__(self) -> None:
        for name in ("ratio", "threshold"):
            self.check(name, 0.0, 1.0)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))

    def prepare(self, family: Family) -> MemVR:
        count = family.num_layers
        if self.layers is None:
            layers = tuple(n for n in in_proportion(6, 16, count) if n < count - 1)
        else:
            layers = layer_numbers("memvr.layers", self.layers, count)
        if count - 1 in layers:
            raise MethodError(f"memvr.layers={self.layers!r}: no layer follows the last; give layers up to {count - 2}")
        return dataclasses.replace(self, layers=layers)

    def retrace(self) -> Retrace | None:
        if self.ratio == 0:
            return None
        return Retrace(layers=self.layers or (), threshold=self.threshold, ratio=self.ratio, activation=self.activation)
