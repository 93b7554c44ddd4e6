"""Recipes: every number that decides what a trained TinyWorld model is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from mmfix_evals.tinyworld.world import SIZE


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        name: ``patches`` (tower against patch contents), ``words`` (projector against word embeddings), ``answers``
            (yes/no turns) or ``mixed`` (captions and yes/no turns).
        steps: optimiser steps.
        batch: pictures per step.
        rate: peak learning rate (cosine to zero).
        tower: factor on the rate for the vision tower.
        captions: share of sequences that begin with a caption.
        warmup: steps of linear warm-up.
    """

    name: str
    steps: int
    batch: int
    rate: float
    tower: float = 1.0
    captions: float = 0.0
    warmup: int = 100


@dataclass(frozen=True)
class Recipe:
    """Model sizes, data and stages."""

    name: str
    stages: tuple[Stage, ...]
    pictures: int = 40_000
    patch: int = 12
    vision_width: int = 160
    vision_mlp: int = 512
    vision_layers: int = 6
    text_width: int = 192
    text_mlp: int = 512
    text_layers: int = 6
    seed: int = 0

    @property
    def image_tokens(self) -> int:
        return (SIZE // self.patch) ** 2

    @property
    def digest(self) -> str:
        """Names the recipe's numbers: two recipes with the same digest train the same model."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


RECIPES = {
    "small": Recipe(
        "small",
        (
            Stage("patches", 900, 96, 1.5e-3),
            Stage("words", 500, 96, 1e-3, tower=0.3),
            Stage("answers", 1100, 32, 1.5e-3, tower=0.1, warmup=200),
            Stage("mixed", 1200, 32, 1.2e-3, tower=0.1, captions=0.55),
        ),
    ),
    # For a GPU: more pictures, longer stages; the same shape of model.
    "large": Recipe(
        "large",
        (
            Stage("patches", 6000, 256, 1e-3),
            Stage("words", 3000, 256, 1e-3, tower=0.2),
            Stage("answers", 20_000, 128, 1.5e-3, tower=0.1, warmup=500),
            Stage("mixed", 30_000, 128, 1.2e-3, tower=0.1, captions=0.55),
        ),
        pictures=200_000,
    ),
    # For tests: every stage, no skill.
    "quick": Recipe(
        "quick",
        (
            Stage("patches", 3, 8, 1e-3, warmup=1),
            Stage("words", 3, 8, 1e-3, tower=0.2, warmup=1),
            Stage("answers", 3, 4, 1e-3, tower=0.1, warmup=1),
            Stage("mixed", 3, 4, 1e-3, tower=0.1, captions=0.5, warmup=1),
        ),
        pictures=24,
        vision_width=32,
        vision_mlp=64,
        vision_layers=2,
        text_width=32,
        text_mlp=64,
        text_layers=2,
    ),
}
