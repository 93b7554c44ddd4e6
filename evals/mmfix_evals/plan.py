"""What a run will ask: documents, their hashes, generation arguments and the key of every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfix_evals.arms import Arm
from mmfix_evals.batching import AUTO
from mmfix_evals.choices import unknown
from mmfix_evals.errors import UsageError
from mmfix_evals.samples import digest, sample_key
from mmfix_evals.shards import Shard, cut
from mmfix_evals.stats import RESAMPLES
from mmfix_evals.tasks import Document, Task
from mmfix_evals.tasks import get as get_task

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class RunConfig:
    """The options of ``mmfix eval run``.

    Attributes:
        limit: pictures per task, not questions.
        out: run folder; a shard writes into a folder of its own below it.
        batch_size: prompts per batch, or ``"auto"``.
        device_map: as in ``from_pretrained`` of transformers, for a model larger than one device.
        engine, workers: ``"ray"`` and the number of its actors; 0: one per device.
        data: folder with the files of benchmarks; None: see :func:`mmfix_evals.tasks.data.root`.
    """

    model: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    out: Path
    split: str = "test"
    limit: int = 200
    batch_size: int | str = 16
    seed: int = 0
    world_seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    max_new_tokens: int | None = None
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    parser: str | None = None
    resamples: int = RESAMPLES
    max_errors: int = 0
    device_map: str | dict[str, Any] | None = None
    shard: Shard = field(default_factory=Shard)
    engine: str = "local"
    workers: int = 0
    data: Path | None = None

    @property
    def folder(self) -> Path:
        """Where this process writes."""
        return self.shard.folder(self.out)

    def check(self) -> None:
        """Refuse what cannot be meant, before a model is loaded."""
        for name in ("limit", "batch_size", "resamples"):
            given = getattr(self, name)
            if (name, given) != ("batch_size", AUTO) and (isinstance(given, str) or given < 1):
                more = ", or auto" if name == "batch_size" else ""
                raise UsageError(f"--{name.replace('_', '-')} {given}: give a number of 1 or more{more}")
        if self.engine not in ENGINES:
            raise UsageError(unknown("engine", self.engine, ENGINES))
        if self.device_map is not None and self.device != "auto":
            raise UsageError(f"--device {self.device} and --device-map say two things: give one of them")
        for name in ("seed", "world_seed", "max_errors", "workers"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a number of 0 or more")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: give a number of 1 or more")
        if self.data is not None and not self.data.is_dir():
            raise UsageError(f"--data {self.data}: no such folder; give the one that the files of benchmarks lie in")
        if not self.tasks:
            raise UsageError("no task given: use for instance --tasks tinyworld-pope,tinyworld-chair")
        for name in self.tasks:
            task = get_task(name)
            if self.split not in task.data_splits:
                raise UsageError(f"task {name}: {unknown('split', self.split, task.data_splits)}")
        flavours = {flavour for name in self.tasks for flavour in get_task(name).flavours}
        if self.parser is not None and self.parser not in flavours:
            raise UsageError(unknown("parser", self.parser, flavours))


@dataclass(frozen=True)
class TaskPlan:
    """One task of a run.

    Attributes:
        image_sha256: picture name → hash of its pixels, in the order of first use.
        generation: arguments of every ``generate`` call.
        protocol: identity of everything but the method.
    """

    task: Task
    flavour: str
    data_split: str
    documents: list[Document]
    image_sha256: dict[str, str]
    generation: dict[str, Any]
    protocol: str
    model: dict[str, Any]
    seed: int

    def part(self, shard: Shard, batch_size: int | str) -> list[Document]:
        """The documents of one shard: whole batches, or single documents where every worker finds a size by itself."""
        if shard.is_whole:
            return self.documents
        batches = cut(self.documents, 1 if isinstance(batch_size, str) else batch_size)
        return [document for batch in shard.part(batches) for document in batch]

    def keys(self, arm: Arm) -> dict[str, Document]:
        """Key → document, in the order of asking."""
        return {self.key(arm, document): document for document in self.documents}

    def key(self, arm: Arm, document: Document) -> str:
        return sample_key(
            task=self.task.name,
            doc_id=document.doc_id,
            prompt=document.prompt,
            image_sha256=self.image_sha256[document.image],
            model=self.model,
            method={"name": arm.name, "spec": arm.spec},
            generation={**self.generation, **arm.generation},
            seed=self.seed,
        )

    def describe(self) -> dict[str, Any]:
        """The entry of this task in ``results.json``."""
        images = list(self.image_sha256)
        return {
            "data_split": self.data_split,
            self.task.flavour_field: self.flavour,
            "protocol": self.protocol,
            "data": data_hashes(self.task, self.documents, self.image_sha256),
            "image_ids": images,
            "image_ids_sha256": digest(images),
            "prompts_sha256": digest([document.prompt for document in self.documents]),
            "n_images": len(images),
            "n_documents": len(self.documents),
            "generation": self.generation,
            "files": self.task.sources(self.data_split),
        }


def data_hashes(task: Task, documents: list[Document], image_sha256: dict[str, str]) -> dict[str, str]:
    """sha256 of the questions with their answers, and of the pictures."""
    listed = [[d.doc_id, d.split, d.image, d.prompt if task.prompt_is_data else "", d.target] for d in documents]
    return {"documents_sha256": digest(listed), "images_sha256": digest(list(image_sha256.items()))}


@dataclass(frozen=True)
class Asked:
    """What a task asks, whichever model answers: its documents, and picture name → hash of its pixels."""

    task: Task
    documents: list[Document]
    image_sha256: dict[str, str]


def read_tasks(config: RunConfig) -> list[Asked]:
    """Read the data of every task of a run. Needs no model, so that a missing file is said before one is loaded.

    Raises:
        DataError: files or pictures are missing or damaged; says which, and where they come from.
    """
    found = []
    for name in dict.fromkeys(config.tasks):
        task = get_task(name)
        documents = task.documents(config.split, config.limit, config.world_seed)
        images = {image: task.image_sha256(image) for image in dict.fromkeys(d.image for d in documents)}
        found.append(Asked(task, documents, images))
    return found


def plan(config: RunConfig, model: dict[str, Any], asked: Sequence[Asked] | None = None) -> list[TaskPlan]:
    """Draw up every task of a run for a model with the given fingerprint; ``asked`` of :func:`read_tasks`."""
    return [_plan_task(config, one, model) for one in (read_tasks(config) if asked is None else asked)]


def _plan_task(config: RunConfig, asked: Asked, model: dict[str, Any]) -> TaskPlan:
    task, documents, images = asked.task, asked.documents, asked.image_sha256
    tokens = config.max_new_tokens or task.max_new_tokens
    generation = {"do_sample": False, "max_new_tokens": tokens, **config.gen_kwargs}
    protocol = {
        "task": task.name,
        "data_split": config.split,
        "data": data_hashes(task, documents, images),
        "model": model,
        "prompts": digest([document.prompt for document in documents]),
        "generation": generation,
        "seed": config.seed,
    }
    return TaskPlan(
        task=task,
        flavour=config.parser if config.parser in task.flavours else task.flavour(None),
        data_split=config.split,
        documents=documents,
        image_sha256=images,
        generation=generation,
        protocol=digest(protocol),
        model=model,
        seed=config.seed,
    )
