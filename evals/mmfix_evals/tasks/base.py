"""The task interface, the metric description and the registry."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmfix_evals.choices import unknown
from mmfix_evals.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Document:
    """One thing to ask: a picture and a prompt.

    Attributes:
        doc_id: names the document within its task; stable over runs.
        split: the part of the task it is scored in (POPE: ``random``, ``popular``, ``adversarial``).
        image: name of the picture; pictures are the clusters of every interval.
        prompt: the text given to the model, before its chat template.
        target: what the answer is scored against, as JSON values; merged into the sample's line.
    """

    doc_id: str
    split: str
    image: str
    prompt: str
    target: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A number computed from *summed* counts, so that the same formula serves the value and every resample.

    Attributes:
        name: the name in ``results.json``.
        formula: counts ``[..., len(columns)]`` → ``[...]``; NaN where the metric is undefined.
        percent: printed as value × 100 with one decimal; otherwise as a plain number.
        headline: shown in the table by default.
        integer: a count: stored as an integer.
        better: ``"higher"``, ``"lower"``, or None where neither direction is better.
        outcome: the 0/1 column of one sample that McNemar's test uses, or None.
    """

    name: str
    formula: Callable[[Counts], Counts]
    percent: bool = True
    headline: bool = False
    integer: bool = False
    better: str | None = "higher"
    outcome: str | None = None


class Task(ABC):
    """Documents, prompts and scoring of one benchmark. Scoring reads sample lines only: no model, no picture."""

    name: ClassVar[str]
    title: ClassVar[str]
    data_splits: ClassVar[tuple[str, ...]]
    splits: ClassVar[tuple[str, ...]]
    """The values of :attr:`Document.split`; empty: the data split itself."""
    max_new_tokens: ClassVar[int]
    columns: ClassVar[Sequence[str]]
    """The per-sample counts, summed per picture before any metric is computed."""
    metrics: ClassVar[tuple[Metric, ...]]
    macro: ClassVar[tuple[str, ...]] = ()
    """Metrics whose plain mean over :attr:`splits` is reported as split ``macro``."""
    flavours: ClassVar[tuple[str, ...]]
    """Scoring rules to choose from (POPE: parsers). The first is the default."""
    flavour_field: ClassVar[str]
    """What a flavour is called in ``results.json``: ``parser`` or ``flavour``."""
    unit: ClassVar[str]
    """What one sample is called in the footnote."""
    prompt_is_data: ClassVar[bool] = False
    """Whether the prompts are part of the data set, so that other prompts are other data (POPE's questions)."""
    supplies: ClassVar[frozenset[str]] = frozenset()
    """Methods that lack something without this task, which gives it to them document by document."""
    options: ClassVar[Mapping[str, Sequence[str] | None]] = {}
    """What ``name:option=value`` may set: option → its choices, the default first (None: any text, default empty)."""

    @abstractmethod
    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        """The documents about the first ``limit`` pictures of a data split, in a fixed order."""

    @abstractmethod
    def image(self, name: str) -> Image:
        """The picture called ``name``, RGB."""

    @abstractmethod
    def verdicts(self, document: Document, response: str) -> dict[str, Any]:
        """What is written beside the raw response: every parser's verdict, or the mentions."""

    @abstractmethod
    def counts(self, sample: Mapping[str, Any], flavour: str) -> Mapping[str, float]:
        """The columns of one sample line under one flavour, computed from the raw response."""

    # What follows has a default for tasks with one picture, one turn and independent answers.

    def show(self, document: Document) -> Any:
        """What the model is shown: a picture, or a list of pictures."""
        return self.image(document.image)

    def generate(
        self, decoder: Any, documents: Sequence[Document], shown: Sequence[Any], **arguments: Any
    ) -> list[Any]:
        """The answers to one batch, each with ``text``, ``token_ids``, ``finish_reason`` and ``report``.

        Args:
            decoder: a :class:`mmfix_decoding.Decoder`.
            documents: the batch.
            shown: what :meth:`show` gave for each of them.
            **arguments: of ``decoder.generate``.
        """
        return list(decoder.generate(list(shown), [document.prompt for document in documents], **arguments))

    def record(self, document: Document, answer: Any) -> dict[str, Any]:
        """What stands in the sample's line beside the raw response."""
        return self.verdicts(document, answer.text)

    def join(self, samples: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Samples of one method (split → document id → sample) with what scoring one needs of another added.

        Answers that belong together (the same question asked twice) are scored as a pair; a sample must be copied
        before anything is added to it.
        """
        return samples

    def sources(self, data_split: str) -> dict[str, str]:
        """Name → sha256 of the files that the documents were read from."""
        return {}

    def option(self, name: str) -> str:
        """The value of an option: as given in the task's name, else the default."""
        choices = self.options[name]
        return self._chosen.get(name, choices[0] if choices else "")

    _chosen: Mapping[str, str] = {}

    def configured(self, spec: str) -> Task:
        """This task with options, called ``name:option=value:option=value``; :class:`UsageError` for a wrong one."""
        chosen: dict[str, str] = {}
        for piece in spec.split(":")[1:]:
            name, equals, given = piece.partition("=")
            if name not in self.options or not equals:
                listed = ", ".join(self.options) or "none"
                raise UsageError(f"task {self.name}: {piece!r} is no option=value; options: {listed}")
            choices = self.options[name]
            if choices and given not in choices:
                raise UsageError(f"task {self.name}: {unknown(name, given, choices)}")
            chosen[name] = given
        task = copy.copy(self)
        task.name = spec  # type: ignore[misc]  # a configured task goes by its full name
        task._chosen = chosen
        return task

    def image_sha256(self, name: str) -> str:
        """Hash of the decoded picture, so that it does not depend on a file format."""
        picture = self.image(name)
        return hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).hexdigest()

    def flavour(self, chosen: str | None) -> str:
        """The flavour to use; a choice that this task does not know is refused."""
        if chosen is None:
            return self.flavours[0]
        if chosen not in self.flavours:
            raise UsageError(unknown(self.flavour_field, chosen, self.flavours))
        return chosen

    def metric(self, name: str) -> Metric:
        return next(metric for metric in self.metrics if metric.name == name)


_TASKS: dict[str, Task] = {}
T = TypeVar("T", bound=Task)


def register(cls: type[T]) -> type[T]:
    """Class decorator: makes a task known under its ``name``."""
    if cls.name in _TASKS:
        raise ValueError(f"a task called {cls.name!r} is registered already: choose another name")
    _TASKS[cls.name] = cls()
    return cls


def names() -> list[str]:
    return sorted(_TASKS)


def tasks() -> Sequence[Task]:
    return [_TASKS[name] for name in names()]


def get(name: str) -> Task:
    """The task called ``name`` or ``name:option=value``; :class:`UsageError` listing the choices for any other."""
    if name in _TASKS:
        return _TASKS[name]
    plain, colon, _ = name.partition(":")
    if plain not in _TASKS:
        raise UsageError(unknown("task", plain, names()))
    return _TASKS[plain].configured(name) if colon else _TASKS[plain]
