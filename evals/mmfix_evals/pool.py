"""Who answers: one model in this process here, actors of Ray in :mod:`mmfix_evals.ray_pool`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mmfix_evals import machine
from mmfix_evals.arms import Arm, calibrated, choose
from mmfix_evals.fingerprint import fingerprint
from mmfix_evals.plan import RunConfig, TaskPlan
from mmfix_evals.samples import Sample
from mmfix_evals.tasks import Document
from mmfix_evals.tasks import get as get_task
from mmfix_evals.worker import Worker

Load = Callable[[RunConfig], Any]
Answered = tuple[str, list[Sample]]
"""An arm's name and some of its lines."""


@dataclass(frozen=True)
class Job:
    """A batch, and the ids of its documents that each arm has still to answer."""

    batch: Sequence[Document]
    wanted: dict[str, set[str]]


@dataclass(frozen=True)
class Loaded:
    """What is known once a model is loaded.

    Attributes:
        arms: methods with what is calibrated for the model.
        left_out: members of a group of methods that cannot run on this model → the reason.
        identity: of the model's files; part of every sample's key.
        dtype, device: of its parameters.
        machine: see :func:`mmfix_evals.machine.machine`.
        calibrated: arm → method → which of its values were calibrated for the model, and on what data.
    """

    arms: list[Arm]
    identity: dict[str, Any]
    dtype: str
    device: str
    machine: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    calibrated: dict[str, dict[str, Any]] = field(default_factory=dict)


class Pool(Protocol):
    """One or more workers with the same model."""

    loaded: Loaded

    def find_batch_size(self, one: TaskPlan, arms: Sequence[Arm], documents: Sequence[Document]) -> int:
        """See :meth:`Worker.find_batch_size`."""
        ...

    def answers(self, one: TaskPlan, jobs: Sequence[Job]) -> Iterator[Answered]:
        """Every wanted document of every job once, in any order of jobs, as the answers come."""
        ...

    def describe(self) -> dict[str, Any]:
        """Engine, number of workers and the batch sizes that memory forced; goes into ``timing``."""
        ...

    def reports(self) -> dict[str, dict[str, Any]]:
        """Task → arm → the engine's last report."""
        ...

    def close(self) -> None: ...


def load_decoder(config: RunConfig) -> Any:
    """The decoder of ``config.model``; imported here because it brings torch.

    Under ``torchrun`` and ``accelerate launch`` LOCAL_RANK chooses the device, unless one is named.
    """
    import torch

    from mmfix_decoding import Decoder

    device, local = config.device, os.environ.get("LOCAL_RANK", "")
    if device == "auto" and local.isdecimal() and torch.cuda.is_available() and config.device_map is None:
        device = f"cuda:{int(local) % torch.cuda.device_count()}"
    more = {} if config.device_map is None else {"device_map": config.device_map}
    return Decoder.from_pretrained(config.model, device=device, dtype=config.dtype, revision=config.revision, **more)


def load(config: RunConfig, load_: Load) -> tuple[Worker, Loaded]:
    """Load the model, resolve the methods for it."""
    decoder = load_(config)
    model = getattr(decoder, "model", None)
    supplied = frozenset.intersection(*(get_task(name).supplies for name in config.tasks))
    arms, left_out = choose(config.methods, decoder, supplied)
    device = str(getattr(model, "device", "cpu"))
    dtype = str(getattr(model, "dtype", None)).removeprefix("torch.")
    used = {} if model is None else {arm.name: found for arm in arms if (found := calibrated(arm, model))}
    loaded = Loaded(arms, fingerprint(decoder), dtype, device, machine.machine(device), left_out, used)
    return Worker.build(decoder, arms), loaded


class LocalPool:
    """One worker, in this process. Methods take turns on every batch."""

    def __init__(self, config: RunConfig, load_: Load) -> None:
        self.worker, self.loaded = load(config, load_)

    def find_batch_size(self, one: TaskPlan, arms: Sequence[Arm], documents: Sequence[Document]) -> int:
        return self.worker.find_batch_size(one, arms, documents)

    def answers(self, one: TaskPlan, jobs: Sequence[Job]) -> Iterator[Answered]:
        for job in jobs:
            arms = [arm for arm in self.loaded.arms if job.wanted.get(arm.name)]
            self.worker.warm_up(one, arms, job.batch)
            for arm in arms:
                for lines in self.worker.answer(one, arm, job.batch, job.wanted[arm.name]):
                    yield arm.name, lines

    def describe(self) -> dict[str, Any]:
        return {"engine": "local", "workers": 1, "reduced_batch_sizes": dict(self.worker.limits)}

    def reports(self) -> dict[str, dict[str, Any]]:
        return self.worker.reports

    def close(self) -> None:
        """Nothing to stop."""
