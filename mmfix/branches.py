"""Contrast branches: what is different in the extra rows of a batch.

Row ``b*R + r`` is branch r of prompt b; branch 0 is the factual one. ``generate()`` sees one row per prompt: inputs are
expanded before the model's forward pass and the logits folded after it (:mod:`mmfix.branchrows`), so every decoding
mode acts on mixed logits (:mod:`mmfix.mixing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmfix.pictures import Blank, DiffusionNoise
from mmfix.prompts import PromptEdit
from mmfix.relevance import KeepRelevant
from mmfix.selection import Blind, Outliers, Selection
from mmfix_kernels import Edit, MapReplacement

VisionVariant = Literal["paper", "release"]


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionEdit:
    """A counterfactual look at the same picture.

    Args:
        maps: the map put in place of the vision tower's.
        variant: "paper" replaces the maps of `layers`; "release" leaves the tower alone and multiplies the features it
            hands to the projector by weights made from one map, as CausalMM's released code does.
        layers: tower layers, negative from the end.
        part: "tower", or "resampler": the Q-Former or perceiver between tower and language model, whose layers are its
            attention calls in order (of a Q-Former: self, cross, self, …).
    """

    maps: MapReplacement
    variant: VisionVariant = "paper"
    layers: tuple[int, ...] = (-2,)
    part: Literal["tower", "resampler"] = "tower"


PixelEdit = DiffusionNoise | Blank | KeepRelevant


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """One counterfactual row per prompt.

    Args:
        image: False removes the image tokens from the prompt (positions close up).
        vision: a changed look of the vision tower at the picture, or None.
        pixels: a changed picture, or None.
        prompt: a changed prompt, or None.
        edits: attention edits of this branch alone.
        layers: language layers in which they act; None means all.
        select: which image tokens this branch keeps; None means all.
    """

    image: bool = True
    vision: VisionEdit | None = None
    pixels: PixelEdit | None = None
    prompt: PromptEdit | None = None
    edits: tuple[Edit, ...] = ()
    layers: tuple[int, ...] | None = None
    select: Selection | None = None

    @property
    def looks(self) -> bool:
        """Whether the picture is encoded anew for this branch."""
        return self.vision is not None or self.pixels is not None or isinstance(self.select, Outliers)

    @property
    def sees_otherwise(self) -> bool:
        """Whether the features of this branch's image tokens are not the factual ones."""
        return self.looks or isinstance(self.select, Blind)

    @property
    def rewrites(self) -> bool:
        """Whether the tokens of this branch's prompt are not the factual ones."""
        return not self.image or self.prompt is not None or isinstance(self.select, Outliers)
