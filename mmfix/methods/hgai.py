"""HGAI: heads guided attention intervention in middle layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mmfix.families import Family
from mmfix.method import Method, Site, chosen_layers, in_proportion
from mmfix.registry import param, register
from mmfix_kernels import Edit, Group, Rows, ScoreEdit


@register("hgai", title="Heads Guided Attention Intervention", paper="arXiv:2411.16724", kind="score edit")
@dataclass(frozen=True, kw_only=True)
class HGAI(Method):
    """Raise every head's scores on the image by what the heads of the layer, on average, give it.

    *Devils in Middle Layers of Large Vision-Language Models: Interpreting, Detecting and Mitigating Object
    Hallucinations via Attention Lens* (CVPR 2025, arXiv:2411.16724). For the last prompt token and every generated
    one, in the middle layers, before the softmax, with H query heads::

        S_hj <- S_hj + alpha / H sum_h' |S_h'j|        j an image key

    The same is added in every head, so that heads agree on where they look; with grouped key heads the mean is over the
    query heads. One forward pass per token. Recall falls along with hallucination: report both.

    The released code takes layers 5 to 17 of 32 while the name of its log says 5 to 19; the layers in force are in the
    report of every run.

    Args:
        alpha: share of the mean magnitude that is added, 0 to 10.
        layers: layers that are changed; None takes 5 to 17 of 32 in proportion to the model's depth.

    Raises:
        MethodError: a value out of range.
        UnsupportedModel: the image is not part of the prompt.
    """

    alpha: float = param(0.5, "share of the heads' mean magnitude added on image keys", 0.0, 2.0)
    layers: tuple[int, ...] | None = param(None, "layers that are changed; empty = 5 to 17 of 32, in proportion")

    def __post_init__(self) -> None:
        self.check("alpha", 0.0, 10.0)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))

    def prepare(self, family: Family) -> HGAI:
        count = family.num_layers
        return dataclasses.replace(self, layers=chosen_layers(self, in_proportion(5, 18, count), count))

    def edits(self, site: Site) -> Sequence[Edit]:
        if self.alpha == 0 or site.layer not in (self.layers or ()) or not site.spans.any_image:
            return ()
        return (ScoreEdit(group=Group.IMAGE, rows=Rows.LAST, mean_abs_gain=self.alpha),)
