"""Stand-ins for the run tests: two small tasks and a decoder without a model.

An answer depends on the prompt, the picture, the arguments and the methods, not on the batch or its place.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import mmfix
from mmfix_evals.tasks import Document, Task, base
from mmfix_evals.tasks.chair import ChairTask
from mmfix_evals.tasks.pope import PopeTask

if TYPE_CHECKING:
    import pytest

OBJECTS = ("cat", "dog", "car", "cup", "book", "bed")


def picture(name: str) -> Image.Image:
    return Image.new("RGB", (4, 4), tuple(hashlib.sha256(name.encode()).digest()[:3]))


class FakePope(PopeTask):
    name = "fake-pope"
    title = "questions about pictures of one colour"
    data_splits = ("dev", "test")

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        return [
            Document(
                f"{split}/{index * 2 + half}",
                split,
                f"{data_split}_{world_seed}_{index}.png",
                f"Is there a {OBJECTS[(index + half) % len(OBJECTS)]} in the image? ({split})",
                {"label": ("yes", "no")[half]},
            )
            for split in self.splits
            for index in range(limit)
            for half in (0, 1)
        ]

    def image(self, name: str) -> Image.Image:
        return picture(name)


class FakeChair(ChairTask):
    name = "fake-chair"
    title = "captions of pictures of one colour"
    data_splits = ("dev", "test")

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        target = {"ground_truth": ["cat", "dog"], "expected": ["car"]}
        names = [f"{data_split}_{world_seed}_{index}.png" for index in range(limit)]
        return [Document(name, data_split, name, "Describe the image.", target) for name in names]

    def image(self, name: str) -> Image.Image:
        return picture(name)


def register(patch: pytest.MonkeyPatch, *fakes: Task) -> None:
    """Make some tasks known as if they were built in, for as long as ``patch`` lasts."""
    patch.setattr(base, "_TASKS", {**base._TASKS, **{task.name: task for task in fakes}})


@dataclass
class FakeAnswer:
    text: str
    token_ids: list[int]
    report: dict[str, Any] | None
    finish_reason: str = "stop"


@dataclass
class FakeDecoder:
    """``generate`` calls are listed in ``calls`` as (method, prompts); ``before`` may raise for one of them."""

    model_id: str = "fake"
    methods: tuple[Any, ...] = ()
    calls: list[tuple[str, list[str]]] = field(default_factory=list)
    before: Callable[[str, Sequence[str]], None] | None = None
    fires: bool = True
    model: Any = None

    @property
    def label(self) -> str:
        return "+".join(method.info.name for method in self.methods) or "greedy"

    def with_method(self, method: Any) -> FakeDecoder:
        return FakeDecoder(self.model_id, tuple(method or ()), self.calls, self.before, self.fires)

    def generate(
        self, images: list[Image.Image], prompts: list[str], *, max_new_tokens: int, **kwargs: Any
    ) -> list[FakeAnswer]:
        assert len(images) == len(prompts) == kwargs["batch_size"]
        self.calls.append((self.label, list(prompts)))
        if self.before is not None:
            self.before(self.label, prompts)
        specs = f"{max_new_tokens} {kwargs['seed']} {[mmfix.spec(method) for method in self.methods]}"
        return [
            self._answer(f"{prompt}{image.tobytes().hex()}{specs}", prompt)
            for image, prompt in zip(images, prompts, strict=True)
        ]

    def _answer(self, content: str, prompt: str) -> FakeAnswer:
        seed = hashlib.sha256(content.encode()).digest()
        if prompt.startswith("Is there"):
            text = ("Yes", "No", "Yes, there is.", "No.", "I cannot say", "Yes")[seed[0] % 6]
        else:
            named = [OBJECTS[byte % len(OBJECTS)] for byte in seed[:3]]
            text = f"There is a {named[0]} and a {named[1]}. A {named[2]} is near the {named[0]}."
        fired = {m.info.name: {"fired": 3 if self.fires else 0, "considered": 4, "share": 0.75} for m in self.methods}
        report = {"fired": fired, "passes_per_token": 1.0} if self.methods else None
        return FakeAnswer(text, list(range(len(text.split()))), report)


def load_in_actor(folder: str, config: Any) -> FakeDecoder:
    """A slow decoder that leaves the number of its process in ``folder``."""
    Path(folder, str(os.getpid())).touch()
    return FakeDecoder(before=lambda *_: time.sleep(0.03))
