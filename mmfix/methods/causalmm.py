"""CausalMM: contrast with counterfactual attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfix.branches import Branch, VisionEdit
from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, layer_numbers
from mmfix.mixing import Mix, contrast
from mmfix.registry import param, register
from mmfix_kernels import MapReplacement, Rows
from mmfix_kernels.edits import MapKind

VISION = ("shuffled", "random", "uniform", "reversed")
LANGUAGE = ("random", "uniform", "reversed", "reversed_normalised")


@register("causalmm", title="CausalMM", paper="arXiv:2410.04780", kind="contrast", passes=3)
@dataclass(frozen=True, kw_only=True)
class CausalMM(Method):
    """Subtract what the model would say with counterfactual attention, in the tower, the language model, or both.

    *Mitigating Modality Prior-Induced Hallucinations … via Deciphering Attention Causality* (ICLR 2025,
    arXiv:2410.04780). With factual logits l and counterfactual ones l_v (tower's map replaced) and l_t (language
    model's maps replaced in the middle layers)::

        one level   z = (1 + gamma) l - gamma l_cf
        both        z = (1 + 2 gamma) l - gamma l_v - gamma l_t
        cut         z_i = -inf unless l_i >= log(epsilon) + max l

    The backdoor adjustment is an expectation over counterfactual maps; `draws` of them are averaged. Every branch is a
    row of the same batch with its own cache.

    Args:
        vision: map put in place of the tower's, or None to leave the tower alone.
        language: map put in place of the language model's; "reversed" is ``max - A`` as released (not normalised).
        gamma: strength, at least 0.
        epsilon: plausibility cut, in (0, 1].
        language_layers: layers whose map is replaced; None takes the middle third.
        language_rows: query rows whose language map is replaced: "all", or those "after_image". The latter leaves the
            keys and values of the system text and the image as they are, so that they are computed and stored once.
        draws: counterfactual maps that are drawn and averaged, per level, at least 1.
        seed: of random maps and permutations.
        variant: "paper" replaces maps, normalised over allowed keys; "release" scales image features by a resized map
            and uses the released scaling of uniform and random language maps.

    Raises:
        MethodError: a value out of range, or neither level chosen.
        UnsupportedModel: the vision tower cannot be edited, or release weights need a square grid.
    """

    vision: Literal["shuffled", "random", "uniform", "reversed"] | None = param("shuffled", "tower map, or empty")
    language: Literal["random", "uniform", "reversed", "reversed_normalised"] | None = param(
        "random", "language map, or empty"
    )
    gamma: float = param(1.0, "strength of the contrast", 0.0, 5.0)
    epsilon: float = param(0.1, "plausibility cut", 0.0, 1.0)
    language_layers: tuple[int, ...] | None = param(None, "layers whose map is replaced; empty = middle third")
    language_rows: Literal["all", "after_image"] = param("all", "rows whose language map is replaced")
    draws: int = param(1, "counterfactual maps averaged", 1, 16)
    seed: int = param(0, "seed of random maps", 0, 2**31 - 1)
    variant: Literal["paper", "release"] = param("paper", "paper or release")

    def __post_init__(self) -> None:
        self.check("gamma", 0.0, 100.0)
        self.check("epsilon", 1e-9, 1.0)
        self.check("draws", 1, 64)
        for name, value, choices in (("vision", self.vision, VISION), ("language", self.language, LANGUAGE)):
            if value is not None and value not in choices:
                raise MethodError(f"causalmm.{name}={value!r}: choose one of {', '.join(choices)}, or None")
        if self.vision is None and self.language is None:
            raise MethodError("causalmm: vision and language are both None, so nothing is contrasted; choose one")
        if self.language_rows not in ("all", "after_image"):
            raise MethodError(f"causalmm.language_rows={self.language_rows!r}: choose 'all' or 'after_image'")
        if self.variant not in ("paper", "release"):
            raise MethodError(f"causalmm.variant={self.variant!r}: choose 'paper' or 'release'")
        if self.language_layers is not None:
            object.__setattr__(self, "language_layers", tuple(int(n) for n in self.language_layers))

    def prepare(self, family: Family) -> CausalMM:
        if self.language_layers is None:
            return self
        layers = layer_numbers(f"{self.info.name}.language_layers", self.language_layers, family.num_layers)
        return dataclasses.replace(self, language_layers=layers)

    def branches(self, family: Family) -> Sequence[Branch]:
        if self.gamma == 0:
            return []
        layers = self.language_layers
        if layers is None:
            layers = tuple(range(family.num_layers // 3, max(family.num_layers // 3 + 1, 2 * family.num_layers // 3)))
        found = []
        for draw in range(self.draws):
            seed = self.seed + draw
            if self.vision is not None:
                maps = MapReplacement(kind=self.vision, seed=seed)
                found.append(Branch(vision=VisionEdit(maps=maps, variant=self.variant)))
            if self.language is not None:
                found.append(Branch(edits=(self._language_map(seed),), layers=layers))
        return found

    def _language_map(self, seed: int) -> MapReplacement:
        kinds: dict[str, MapKind] = {"random": "random", "uniform": "uniform"}
        assert self.language is not None
        rows = Rows.ALL if self.language_rows == "all" else Rows.AFTER_IMAGE
        if self.language in kinds:
            return MapReplacement(kind=kinds[self.language], seed=seed, normalise=self.variant == "paper", rows=rows)
        return MapReplacement(kind="reversed", normalise=self.language == "reversed_normalised", rows=rows)

    def mix(self) -> Mix:
        if self.gamma == 0:
            return Mix(weights=(1.0,), beta=self.epsilon)
        levels = (self.vision is not None) + (self.language is not None)
        return contrast(self.gamma / self.draws, branches=levels * self.draws, beta=self.epsilon)


@register("causalmm-vision", title="CausalMM, vision level", paper="arXiv:2410.04780", kind="contrast", passes=2)
@dataclass(frozen=True, kw_only=True)
class CausalMMVision(CausalMM):
    """:class:`CausalMM` at the vision level only."""

    language: Literal["random", "uniform", "reversed", "reversed_normalised"] | None = param(
        None, "language map, or empty"
    )


@register("causalmm-language", title="CausalMM, language level", paper="arXiv:2410.04780", kind="contrast", passes=2)
@dataclass(frozen=True, kw_only=True)
class CausalMMLanguage(CausalMM):
    """:class:`CausalMM` at the language level only."""

    vision: Literal["shuffled", "random", "uniform", "reversed"] | None = param(None, "tower map, or empty")
