"""VAF: visual amplification fusion, of ClearSight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, Site, chosen_layers, in_proportion
from mmfix.registry import param, register
from mmfix_kernels import Edit, Group, Rows, ScoreEdit


@register("vaf", title="ClearSight (VAF)", paper="arXiv:2503.13107", kind="score edit")
@dataclass(frozen=True, kw_only=True)
class VAF(Method):
    """Scale scores up on the image and down on the system prompt, in the layers where image and text meet.

    *ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large Language Models*
    (CVPR 2025, arXiv:2503.13107). For text rows after the image and every generated token, before the softmax::

        S_j <- image_gain  S_j        j an image key
        S_j <- system_gain S_j        j a text key before the image

    Scores have a sign, and a factor moves the negative ones the wrong way: an image key with S_j < 0 loses attention
    by a gain above 1. ``form="magnitude"`` adds ``(gain - 1) |S_j|`` instead, which is the same for positive scores
    and raises negative ones too. Keys that the mask hides stay hidden. One forward pass per token.

    The released code (whose form is "signed") takes the first 35 tokens for the system prompt and the next 576 for
    the image, whatever the prompt; here both come from the prompt. Its layers 9 to 14 are those of a model with 32.

    Args:
        image_gain: factor on image keys, 0 to 10; 1 leaves them.
        system_gain: factor on the text before the image, 0 to 10; 1 leaves it.
        layers: layers that are changed; None takes the released ones in proportion to the model's depth.
        form: "signed" multiplies scores as released; "magnitude" adds in proportion to their size.

    Raises:
        MethodError: a value out of range.
        UnsupportedModel: the image is not part of the prompt.
    """

    image_gain: float = param(1.15, "factor on scores of image keys", 0.0, 3.0)
    system_gain: float = param(0.95, "factor on scores of the text before the image", 0.0, 3.0)
    layers: tuple[int, ...] | None = param(None, "layers that are changed; empty = 9 to 14 of 32, in proportion")
    form: Literal["signed", "magnitude"] = param("signed", "multiply scores, or add to them by magnitude")

    def __post_init__(self) -> None:
        self.check("image_gain", 0.0, 10.0)
        self.check("system_gain", 0.0, 10.0)
        if self.form not in ("signed", "magnitude"):
            raise MethodError(f"vaf.form={self.form!r}: choose 'signed' or 'magnitude'")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))

    def prepare(self, family: Family) -> VAF:
        count = family.num_layers
        return dataclasses.replace(self, layers=chosen_layers(self, in_proportion(9, 15, count), count))

    def edits(self, site: Site) -> Sequence[Edit]:
        if site.layer not in (self.layers or ()):
            return ()
        pairs = ((Group.IMAGE, self.image_gain), (Group.SYSTEM, self.system_gain))
        return tuple(self._edit(group, gain) for group, gain in pairs if gain != 1)

    def _edit(self, group: Group, gain: float) -> ScoreEdit:
        if self.form == "signed":
            return ScoreEdit(group=group, rows=Rows.AFTER_IMAGE, gain=gain)
        return ScoreEdit(group=group, rows=Rows.AFTER_IMAGE, abs_gain=gain - 1)
