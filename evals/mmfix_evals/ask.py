"""Asking a model: one batch in, one sample line per document out, with time, tokens and what the method did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mmfix_evals.arms import Arm
from mmfix_evals.plan import TaskPlan
from mmfix_evals.samples import Sample
from mmfix_evals.tasks import Document

WARM_UP_TOKENS = 4


def generate(decoder: Any, plan: TaskPlan, documents: Sequence[Document], **override: Any) -> tuple[list[Any], float]:
    """Answers of one batch and the seconds it took.

    When sampling, the decoder makes every request's seed from the run's seed and the request itself, so that an
    answer depends neither on its place nor on its neighbours, and methods share their draws.
    """
    shown = [plan.task.show(document) for document in documents]
    arguments = {**plan.generation, **override}
    start = time.perf_counter()
    answers = plan.task.generate(decoder, documents, shown, seed=plan.seed, batch_size=len(documents), **arguments)
    return list(answers), time.perf_counter() - start


def warm_up(decoder: Any, plan: TaskPlan, arm: Arm, documents: Sequence[Document]) -> None:
    """One short untimed batch, so that no method pays for what the first call of a process costs."""
    limit = min(WARM_UP_TOKENS, int(plan.generation["max_new_tokens"]))
    generate(decoder, plan, documents, **{**arm.generation, "max_new_tokens": limit})


def ask(
    decoder: Any, plan: TaskPlan, arm: Arm, documents: Sequence[Document]
) -> tuple[list[Sample], dict[str, Any] | None]:
    """Sample lines of one batch and the engine's report of it. Raises whatever the model raises."""
    answers, seconds = generate(decoder, plan, documents, **arm.generation)
    if len(answers) != len(documents) or not all(isinstance(answer.text, str) for answer in answers):
        raise RuntimeError(f"the decoder gave {len(answers)} answers to {len(documents)} prompts, or one without text")
    share = 1.0 / len(documents)
    lines = [
        {
            **identity(plan, arm, document),
            "response": answer.text,
            **document.target,
            **plan.task.record(document, answer),
            "finish_reason": answer.finish_reason,
            "seconds": seconds * share,
            "tokens": len(answer.token_ids),
            "fired": fired(answer.report, share),
            "passes_per_token": (answer.report or {}).get("passes_per_token", None if arm.methods else 1.0),
            "error": None,
        }
        for document, answer in zip(documents, answers, strict=True)
    ]
    return lines, answers[0].report


def failed(plan: TaskPlan, arm: Arm, document: Document, problem: Exception) -> Sample:
    """The line of a document that could not be answered. It is never scored, and asked again on resume."""
    message = " ".join(str(problem).split())
    return {
        **identity(plan, arm, document),
        "response": None,
        **document.target,
        "seconds": 0.0,
        "tokens": 0,
        "error": f"{type(problem).__name__}: {message}"[:1000],
    }


def identity(plan: TaskPlan, arm: Arm, document: Document) -> Sample:
    """What names a sample: its key, and the readable parts of it."""
    return {
        "key": plan.key(arm, document),
        "protocol": plan.protocol,
        "task": plan.task.name,
        "data_split": plan.data_split,
        "split": document.split,
        "doc_id": document.doc_id,
        "image": document.image,
        "image_sha256": plan.image_sha256[document.image],
        "method": arm.name,
        "prompt": document.prompt,
    }


def fired(report: dict[str, Any] | None, share: float) -> dict[str, list[float]]:
    """Per method ``[acted, considered]``. The engine counts per batch; every sample of it carries an equal share."""
    counted = (report or {}).get("fired") or {}
    return {name: [found["fired"] * share, found["considered"] * share] for name, found in counted.items()}
