"""Retrieval heads: what becomes of the answer without the heads that look things up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.heads import chosen, factors, fit, of_layer, some
from mmfix.method import Method, Site
from mmfix.registry import param, register
from mmfix_kernels import Edit, HeadScale, MapReplacement


@register("retrieval-heads", title="Retrieval-head ablation", paper="arXiv:2404.15574", kind="head scale")
@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(Method):
    """Take chosen heads out, at every position and step: a diagnostic, not a cure.

    *Retrieval Head Mechanistically Explains Long-Context Factuality* (ICLR 2025, arXiv:2404.15574): answers lose their
    hold on the context without the few heads that copy from it, and keep it without as many other heads.
    ``mmfix heads --score retrieval`` finds them. In prompts with an image, for the chosen heads h::

        ablation="zero"      A_h V <- 0
        ablation="uniform"   A_h   <- 1 / n on the n keys that the row may see

    The released code sets scores (or queries) to zero after the causal mask: that is the uniform map, and in a prefill
    with whole maps it lets rows see later keys. Here a uniform head keeps the mask.

    One forward pass per token.

    Args:
        heads: a file of ``mmfix heads``, or (layer, head) pairs.
        top: of the heads in a file, the share (below 1) or number with the largest score.
        ablation: "zero" or "uniform".

    Raises:
        MethodError: no heads, a head the model does not have, or a value out of range.
        DataError: `heads` names a file that is no head map.
    """

    heads: str | tuple[tuple[float, ...], ...] | None = param(None, "file of `mmfix heads`, or (layer, head) pairs")
    top: float = param(0.05, "share (below 1) or number of the file's heads", 0.0, 100_000.0)
    ablation: Literal["zero", "uniform"] = param("zero", "output zero, or attention spread evenly")

    def __post_init__(self) -> None:
        if self.ablation not in ("zero", "uniform"):
            raise MethodError(f"retrieval-heads.ablation={self.ablation!r}: choose 'zero' or 'uniform'")
        object.__setattr__(self, "heads", some(chosen(self.heads, self.top, "retrieval-heads"), "retrieval-heads"))

    def prepare(self, family: Family) -> RetrievalHeads:
        if self.heads is None:
            raise MethodError("retrieval-heads.heads is not given; find this model's with `mmfix heads --score "
                              "retrieval --out heads.json` and give heads='heads.json'")  # fmt: skip
        fit(self.heads if isinstance(self.heads, tuple) else (), family, "retrieval-heads")
        return self

    def edits(self, site: Site) -> Sequence[Edit]:
        named = of_layer(self.heads, site.layer)
        if not named or not site.spans.any_image:
            return ()
        if self.ablation == "zero":
            return (HeadScale(scale=factors(site.spans, site.num_heads, dict.fromkeys(named, 0.0))),)
        return (MapReplacement(kind="uniform", heads=named, batch=site.spans.has_image),)
