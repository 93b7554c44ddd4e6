"""Small whole files of every scorer, and what a damaged copy of one of them may lead to."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from mmfix_evals.errors import EvalError
from mmfix_evals.metrics import amber, chair, hallusionbench, mme, mmhal, pope, vlind

Content = dict[str, Any]
"""File name → its text, or its records (written as JSON, or as JSON Lines where the name says so)."""
QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass(frozen=True)
class Scorer:
    content: Content
    score: Callable[[Path], Any]


def _mmhal(index: int) -> dict[str, Any]:
    return {
        "question_type": mmhal.TYPES[index % 8],
        "image_id": f"{index:04}",
        "image_content": ["Dog"],
        "question": f"What is {index}?",
        "gt_answer": "A dog.",
        "model_answer": "A cat.",
        "reply": f"Rating: {index % 7}",
    }


def _hallusion(index: int) -> dict[str, Any]:
    return {
        "category": "VD",
        "subcategory": "chart",
        "set_id": "1",
        "figure_id": str(index // 2),
        "question_id": str(index % 2),
        "visual_input": "1" if index < 2 else "2",
        "question": f"Is {index} so?",
        "gt_answer": str(index % 2),
        "gt_answer_details": "so.",
        "model_prediction": "Yes",
    }


VLIND = {
    "global_id": 0,
    "concept": "size",
    "context_id": 0,
    "context": "A mouse is larger than a house.",
    "factual_context": "A mouse is smaller than a house.",
    "true_statement": "The house is smaller.",
    "false_statement": "The mouse is smaller.",
    "existent_noun": "a mouse",
    "non-existent_noun": "a whale",
    "best_img_id": 5,
    "aggregated_human_label_good_images": {str(i): 2 if i in (0, 5) else 1 for i in range(12)},
}
VLIND_ANSWERS = [
    {"global_id": 0, "question": name, "answer": "True" if "1" in name[:2] else "False"}
    for name in ("a1", "a2", "b1", "b2", "c1", "c2", "d1/0", "d2/0", "d1/5", "d2/5")
]
COCO = {
    "instances.json": {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 9, "name": "car"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3}, {"id": 2, "image_id": 2, "category_id": 9}],
    },
    "captions.json": {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "A puppy."}],
    },
}
CAPTIONS = [{"image_id": 1, "caption": "A dog and a car."}, {"image_id": 2, "caption": "A cat in a car."}]
SCORERS = {
    "pope": Scorer(
        {
            "q.jsonl": [
                {"question_id": i, "image": f"{i}.jpg", "text": f"Is there a {i}?", "label": ("yes", "no")[i % 2]}
                for i in range(1, 5)
            ],
            "a.jsonl": [{"question_id": i, "answer": ("Yes", "No, it is", "no")[i % 3]} for i in range(1, 5)],
        },
        lambda folder: pope.score_files(folder / "q.jsonl", folder / "a.jsonl", "strict3way"),
    ),
    "chair": Scorer(
        {"c.jsonl": CAPTIONS, "t.json": {"1": ["dog", "cat"], "2": ["car"]}},
        lambda folder: chair.score_files(folder / "c.jsonl", folder / "t.json"),
    ),
    "coco": Scorer(
        {"c.jsonl": CAPTIONS, **COCO},
        lambda folder: chair.score_files(folder / "c.jsonl", folder),
    ),
    "mme": Scorer(
        {
            "existence.txt": "".join(
                f"{i}.jpg\tIs it {w}?\t{w}\t{a}\n" for i in (1, 2) for w, a in (("Yes", "Yes"), ("No", "yes"))
            )
        },
        lambda folder: mme.score_files(folder),
    ),
    "amber": Scorer(
        {
            "annotations.json": [
                {"id": 1, "type": "discriminative-hallucination", "truth": "no"},
                {"id": 2, "type": "discriminative-attribute-state", "truth": "yes"},
                {"id": 3, "type": "discriminative-relation", "truth": "yes"},
            ],
            "relation.json": {"sky": [], "dog": ["puppy"]},
            "safe_words.txt": "light\nrange",
            "r.json": [{"id": i, "response": ("Yes", "No", "Yes")[i % 3]} for i in (1, 2, 3)],
        },
        lambda folder: amber.score_files(folder / "r.json", folder, "d"),
    ),
    "vlind": Scorer(
        {"d.json": [VLIND], "a.jsonl": VLIND_ANSWERS},
        lambda folder: vlind.score_files(folder / "d.json", folder / "a.jsonl", prompts="instructblip"),
    ),
    "hallusionbench": Scorer(
        {"h.json": [_hallusion(i) for i in range(4)]}, lambda folder: hallusionbench.score_files(folder / "h.json")
    ),
    "mmhal": Scorer({"m.json": [_mmhal(i) for i in range(4)]}, lambda folder: mmhal.score_files(folder / "m.json")),
}


def encoded(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in value).encode()
    return json.dumps(value, indent=1).encode()


def outcome(scorer: Scorer, folder: Path, content: Content, changed: str, data: bytes) -> Any:
    """What is scored with one file changed; a refusal as the error itself, checked to be one good line."""
    for name, value in content.items():
        (folder / name).write_bytes(data if name == changed else encoded(name, value))
    try:
        found = scorer.score(folder)
    except EvalError as problem:
        message = str(problem)
        assert message
        assert len(message) < 4000
        assert "\n" not in message
        return problem
    json.dumps(found, allow_nan=False)  # no number that is none
    return found


def numbers(found: Any) -> Any:
    """A result less its warnings and the hashes of its files."""
    if isinstance(found, dict):
        return {k: numbers(v) for k, v in found.items() if "sha256" not in k and k not in ("warnings", "seconds")}
    return found


def harmless(found: Any, plain: Any) -> bool:
    """Refused, counted aloud, or without effect."""
    if isinstance(found, EvalError):
        return True
    return numbers(found) == numbers(plain) or found["warnings"] != plain["warnings"]


def plain(scorer: Scorer, folder: Path) -> Any:
    found = outcome(scorer, folder, scorer.content, "", b"")
    assert not isinstance(found, EvalError), found
    return found


WRONG = [None, True, -1, 7.5, 10**30, "", "\0", "NaN", "maybe", "x" * 300_000, [], {}, [[]], ["yes"], {"a": None}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = new
    return value


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value
