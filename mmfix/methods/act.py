"""ACT: attention calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.heads import chosen, fit, of_layer
from mmfix.method import Method, Site
from mmfix.registry import param, register
from mmfix_kernels import Edit, KeyMove, Rows


@register("act", title="Attention Calibration Technique", paper="arXiv:2406.15765", kind="mass move")
@dataclass(frozen=True, kw_only=True)
class ACT(Method):
    """Take attention from the sinks within the prompt, in chosen heads, and give it to all other tokens.

    *Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
    Calibration* (ICML 2024, arXiv:2406.15765). With A the attention of a chosen head over a prompt of N tokens, and
    m_k what key k receives on average from the rows that may see it::

        m_k  = sum_q A_qk / #{q : q sees k}
        C    = { k : m_k > threshold }  without the first token          (rule="constant")
        C    = { k : m_k > alpha / N }  without the first token          (rule="relative")
        A_qk <- keep A_qk                                                k in C
        A_qk <- A_qk (1 + (1 - keep) sum_C A_q / (1 - sum_C A_q))        the others, the first token among them

    so every row still sums to one. C is found per head and prompt, from the whole prompt, and stays for the generated
    tokens, which are never sinks themselves.

    The released code edits the first prompt of a batch only, counts padding among the rows that see a key, and in
    decoding divides by one, redistributes to sinks too and overwrites the first token's weight, so that rows sum to
    more than one; here every prompt and every step is right. It spares the first key above the threshold instead of
    the first token (``spare="first-sink"``). The heads were found per model by trying each on classification sets;
    ``mmfix calibrate act`` tries each on TinyWorld's dev questions.

    One forward pass per token; at the prompt, attention of the layers concerned is computed twice.

    Args:
        heads: heads that are calibrated: a file of ``mmfix heads``, (layer, head) pairs, or "all" for every head of
            the layers from 2 to the last but one; None takes those that ``mmfix calibrate act`` found for the model. No
            heads, ``()``, is what it finds where none helps: the plain model, and the report says that nothing fired.
        top: of the heads in such a file, the share (below 1) or number with the largest score.
        keep: share of the sinks' attention that stays, 0 to 1; 1 changes nothing (released: beta = 0.4).
        rule: "constant" or "relative".
        threshold: of the constant rule, 0 to 1 (released: 0.1).
        alpha: of the relative rule, from 0, in shares of 1 / N.
        spare: "first-token" or, as released, "first-sink".

    Raises:
        MethodError: no heads, a head the model does not have, or a value out of range.
        DataError: `heads` names a file that is no head map.
    """

    heads: str | tuple[tuple[float, ...], ...] | None = param(
        None, "calibrated heads: 'all', a file of `mmfix heads`, or (layer, head) pairs; empty = as calibrated"
    )
    top: float = param(0.25, "share (below 1) or number of the file's heads", 0.0, 100_000.0)
    keep: float = param(0.4, "share of the sinks' attention that stays", 0.0, 1.0)
    rule: Literal["constant", "relative"] = param("constant", "what makes a key a sink: a constant, or alpha / N")
    threshold: float = param(0.1, "mean attention received above which a key is a sink", 0.0, 1.0)
    alpha: float = param(5.0, "of the relative rule: the same in shares of 1 / N", 0.0, 1000.0)
    spare: Literal["first-token", "first-sink"] = param("first-token", "which key is never taken from")

    def __post_init__(self) -> None:
        self.check("keep", 0.0, 1.0)
        self.check("threshold", 0.0, 1.0)
        self.check("alpha", 0.0, 1_000_000.0)
        for name, known in (("rule", ("constant", "relative")), ("spare", ("first-token", "first-sink"))):
            if getattr(self, name) not in known:
                raise MethodError(f"act.{name}={getattr(self, name)!r}: choose {known[0]!r} or {known[1]!r}")
        if self.heads != "all":
            object.__setattr__(self, "heads", chosen(self.heads, self.top, "act"))

    def prepare(self, family: Family) -> ACT:
        if self.heads is None:
            raise MethodError(
                "act.heads is not given and no heads were calibrated for this model; run `mmfix calibrate act --model "
                "M`, or give act.heads (pairs, a file of `mmfix heads`, or 'all')"
            )
        if isinstance(self.heads, tuple):
            fit(self.heads, family, "act")
        return self

    def wants_received(self, layer: int, num_layers: int) -> bool:
        if self.keep == 1.0:
            return False
        return 2 <= layer < num_layers - 1 if self.heads == "all" else bool(of_layer(self.heads, layer))

    def received(self, site: Site, mass: Tensor) -> Sequence[Edit]:
        spans = site.spans
        if not spans.any_image:
            return ()
        limit = torch.full_like(mass[:, :1, :1], self.threshold)
        if self.rule == "relative":
            limit = (self.alpha / spans.valid.sum(-1).clamp(min=1).float())[:, None, None]
        sinks = (mass > limit) & (spans.valid & spans.has_image[:, None])[:, None]
        if self.spare == "first-sink":
            sinks &= sinks.cumsum(-1) > 1
        else:
            sinks &= (spans.valid.cumsum(-1) > 1)[:, None]
        if self.heads != "all":
            named = torch.zeros(site.num_heads, dtype=torch.bool, device=mass.device)
            named[list(of_layer(self.heads, site.layer))] = True
            sinks &= named[None, :, None]
        return (KeyMove(chosen=sinks, share=1.0 - self.keep, rows=Rows.ALL),)
