"""One loaded model and its methods answering batches: the part of a run that may stand in another process.

A batch that fails is looked into: memory that ran out halves the batch and goes on, anything else is narrowed down to
the documents at fault, whose lines say why. An error is never an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmfix_evals import batching
from mmfix_evals.arms import Arm
from mmfix_evals.ask import ask, failed, warm_up
from mmfix_evals.errors import EvalError
from mmfix_evals.plan import TaskPlan
from mmfix_evals.samples import Sample
from mmfix_evals.shards import cut
from mmfix_evals.tasks import Document

WARM_UP_PROMPTS = 4  # on a processor


@dataclass
class Worker:
    """A decoder per arm.

    Attributes:
        reports: task → arm → the engine's report of its last batch.
        limits: task → batch size that memory allows; absent until it has run out once.
    """

    decoders: dict[str, Any]
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    _warm: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def build(cls, decoder: Any, arms: Sequence[Arm]) -> Worker:
        return cls({arm.name: decoder.with_method(list(arm.methods) or None) for arm in arms})

    def warm_up(self, one: TaskPlan, arms: Sequence[Arm], batch: Sequence[Document]) -> None:
        """One short untimed batch per arm that has not answered this task yet."""
        for arm in arms:
            if (one.task.name, arm.name) not in self._warm:
                self._warm.add((one.task.name, arm.name))
                limit = self.limits.get(one.task.name, len(batch))
                piece = batch[: limit if self._compiles(arm) else min(WARM_UP_PROMPTS, limit)]
                try:
                    warm_up(self.decoders[arm.name], one, arm, piece)
                except Exception as problem:
                    if is_fatal(problem):
                        raise
                    # The batch itself will fail in the same way and be looked into.

    def _compiles(self, arm: Arm) -> bool:
        """Whether a first batch of a new size costs more than the next: kernels are compiled and tuned for it."""
        return str(getattr(getattr(self.decoders[arm.name], "model", None), "device", "cpu")) != "cpu"

    def answer(self, one: TaskPlan, arm: Arm, batch: Sequence[Document], wanted: set[str]) -> Iterator[list[Sample]]:
        """Lines of the wanted documents of a batch, piece by piece as they come. The whole batch is asked, as in a
        run that was never interrupted; a document that cannot be answered has a line with its error.

        Raises:
            MmfixError, EvalError: asking other documents cannot help (see :func:`is_fatal`).
        """
        todo: list[Sequence[Document]] = [batch]
        while todo:
            piece = todo.pop(0)
            limit = self.limits.get(one.task.name, len(piece))
            if len(piece) > limit:
                todo[:0] = cut(piece, limit)
            elif any(document.doc_id in wanted for document in piece):
                lines, problem = self._ask(one, arm, piece)
                if problem is None:
                    yield [line for line in lines if line["doc_id"] in wanted]
                elif len(piece) == 1:
                    yield [failed(one, arm, piece[0], problem)]
                elif batching.is_out_of_memory(problem):
                    todo.insert(0, piece)
                    self.limits[one.task.name] = (len(piece) + 1) // 2
                    problem.with_traceback(None)  # its frames hold the tensors of the failed batch
                    del problem
                    batching.release()
                else:
                    todo[:0] = cut(piece, 1)

    def _ask(self, one: TaskPlan, arm: Arm, piece: Sequence[Document]) -> tuple[list[Sample], Exception | None]:
        try:
            lines, report = ask(self.decoders[arm.name], one, arm, piece)
        except Exception as problem:
            if is_fatal(problem):
                raise
            return [], problem
        if report:
            self.reports.setdefault(one.task.name, {})[arm.name] = report
        return lines, None

    def find_batch_size(self, one: TaskPlan, arms: Sequence[Arm], documents: Sequence[Document]) -> int:
        """The batch size that every arm can hold, tried on the longest prompts of the task."""
        longest = sorted(documents, key=lambda document: -len(document.prompt))[: batching.MOST]
        memory = batching.device_memory(getattr(getattr(self.decoders[arms[0].name], "model", None), "device", "cpu"))
        size = batching.MOST
        for arm in arms:

            def attempt(count: int, arm: Arm = arm) -> None:
                warm_up(self.decoders[arm.name], one, arm, [longest[i % len(longest)] for i in range(count)])

            size = min(size, batching.find_size(attempt, memory, size))
        return size


def is_fatal(problem: Exception) -> bool:
    """Whether asking other documents cannot help: the method or the model is refused, not one picture."""
    import mmfix.errors

    if isinstance(problem, mmfix.errors.ImageError):
        return False
    return isinstance(problem, (mmfix.errors.MmfixError, EvalError))
