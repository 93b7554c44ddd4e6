"""TinyWorld: a synthetic world whose prior makes a small vision-language model hallucinate."""

from mmfix_evals.tinyworld.data import pope_questions, scenes, write_world
from mmfix_evals.tinyworld.draw import render
from mmfix_evals.tinyworld.text import CAPTION_PROMPT, references
from mmfix_evals.tinyworld.world import (
    CATEGORIES,
    SPLITS,
    PlacedObject,
    Scene,
    absent_partners,
    expected_absent,
    file_name,
    image_index,
    scene,
)

__all__ = [
    "CAPTION_PROMPT",
    "CATEGORIES",
    "SPLITS",
    "PlacedObject",
    "Scene",
    "absent_partners",
    "expected_absent",
    "file_name",
    "image_index",
    "pope_questions",
    "references",
    "render",
    "scene",
    "scenes",
    "write_world",
]
