"""``--engine ray``: an actor per device, each with the whole model, and one queue of batches.

An actor takes the next batch when it is done with its last one, so that long answers hold up nobody else. A batch whose
actor dies is put back and taken by another actor, or by a fresh one in its place; a batch that ends several actors is
given up as failed, document by document. Lines come back to this process, the only one that writes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmfix_evals.arms import Arm
from mmfix_evals.ask import failed
from mmfix_evals.errors import EvalError, MissingDependency, UsageError
from mmfix_evals.plan import RunConfig, TaskPlan
from mmfix_evals.pool import Answered, Job, Load, Loaded, load
from mmfix_evals.samples import Sample
from mmfix_evals.tasks import Document
from mmfix_evals.tasks import get as get_task

ATTEMPTS = 3  # actors that one batch may end before it is given up
RESTARTS = 3  # fresh actors in one place, in a row without an answer


class WorkersLost(EvalError):  # noqa: N818
    """No actor is left; everything finished is on disk."""


def require() -> Any:
    """The module ``ray``, or one sentence on how to get it."""
    try:
        import ray
    except ImportError:
        raise MissingDependency("--engine ray needs Ray, which is not installed: pip install 'mmfix[ray]'") from None
    return ray


class Member:
    """What an actor holds: the model, loaded in its own process on its own device.

    It is loaded by :meth:`describe`, not on creation, because an error of a call comes back as what it is.
    """

    def __init__(self, config: RunConfig, load_: Load, tasks: dict[str, Any]) -> None:
        from mmfix_evals.tasks import base, data

        base._TASKS.update({name: task for name, task in tasks.items() if name not in base._TASKS})
        self.config, self.load = config, load_
        data.below(config.data).__enter__()  # for as long as the actor lives

    def describe(self) -> Loaded:
        self.worker, loaded = load(self.config, self.load)
        return loaded

    def find_batch_size(self, one: TaskPlan, arms: Sequence[Arm], documents: Sequence[Document]) -> int:
        return self.worker.find_batch_size(one, arms, documents)

    def answer(
        self, one: TaskPlan, arm: Arm, batch: Sequence[Document], wanted: set[str]
    ) -> tuple[list[Sample], dict[str, Any], dict[str, int]]:
        """Lines of the wanted documents, the last report, and the batch sizes that memory forced."""
        self.worker.warm_up(one, [arm], batch)
        lines = [line for some in self.worker.answer(one, arm, batch, wanted) for line in some]
        return lines, self.worker.reports.get(one.task.name, {}).get(arm.name, {}), dict(self.worker.limits)


@dataclass
class Turn:
    """One arm's part of a job, and how many actors have died of it."""

    arm: Arm
    job: Job
    deaths: int = 0


@dataclass
class Seat:
    """A place for an actor: a device. Methods take turns on the batches of a seat.

    Attributes:
        loading: Ray's reference to :class:`Loaded`; None once the model is there.
        todo: what is left of the job that this seat has taken.
    """

    actor: Any
    loading: Any
    todo: deque[Turn] = field(default_factory=deque)
    restarts: int = 0


class RayPool:
    """The actors of one run. Uses the cluster this process belongs to, or starts a local one."""

    def __init__(self, config: RunConfig, load_: Load) -> None:
        self.ray = require()
        self.started = not self.ray.is_initialized()
        if self.started:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
            os.environ.setdefault("RAY_worker_niceness", "0")  # by default any other process goes first
            self.ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        self.load = load_
        self._reports: dict[str, dict[str, Any]] = {}
        self.limits: dict[str, int] = {}
        self.lost = 0
        self.seats: list[Seat] = []
        try:
            self.config, self.resources, count = self._share(config)
            for _ in range(count):
                self.seats.append(Seat(*self._actor()))
            self.loaded: Loaded = self._first_loaded()
        except BaseException:
            self.close()
            raise

    def _share(self, config: RunConfig) -> tuple[RunConfig, dict[str, int], int]:
        """What every actor gets, and how many there are."""
        if config.device not in ("auto", "cuda", "cpu"):
            raise UsageError(f"--device {config.device} with --engine ray: Ray chooses the devices; give auto or cpu")
        found = self.ray.cluster_resources()
        gpus, cpus = int(found.get("GPU", 0)), int(found.get("CPU", 0))
        on_gpu = bool(gpus) and config.device in ("auto", "cuda")
        kind, most = ("GPUs", gpus) if on_gpu else ("CPUs", cpus)
        if config.workers > most:
            raise UsageError(f"--workers {config.workers}: the Ray cluster has {most} {kind}; give {most} or fewer")
        if not on_gpu:
            return config, {"num_cpus": 1, "num_gpus": 0}, config.workers or 1
        # Ray shows an actor its own GPUs only, so "auto" finds the right ones.
        config = replace(config, device="auto")
        if config.device_map is not None:
            count = config.workers or 1
            return config, {"num_cpus": 0, "num_gpus": gpus // count}, count
        return config, {"num_cpus": 0, "num_gpus": 1}, config.workers or gpus

    def _actor(self) -> tuple[Any, Any]:
        """A fresh actor and the reference to what it will have loaded."""
        tasks = {name: get_task(name) for name in self.config.tasks}
        # No restart by Ray itself: a lost batch has to be put back into the queue here.
        actor = self.ray.remote(max_restarts=0, **self.resources)(Member).remote(self.config, self.load, tasks)
        return actor, actor.describe.remote()

    def _first_loaded(self) -> Loaded:
        """Of the actor that is ready first; the others load on meanwhile."""
        while True:
            reference = self.ray.wait([seat.loading for seat in self.seats], num_returns=1)[0][0]
            seat = next(seat for seat in self.seats if seat.loading == reference)
            try:
                loaded: Loaded = self._get(reference)
            except self.ray.exceptions.RayActorError as problem:
                self._refill(seat, problem)
                continue
            seat.loading = None
            return loaded

    def _get(self, reference: Any) -> Any:
        """The value, or the error as the actor raised it."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as problem:
            raise problem.cause if isinstance(problem.cause, Exception) else problem from None

    def _refill(self, seat: Seat, problem: Exception) -> None:
        """A fresh actor in a dead one's place."""
        self.lost += 1
        seat.restarts += 1
        if seat.restarts > RESTARTS:
            self.seats = [other for other in self.seats if other is not seat]
            if not self.seats:
                reason = " ".join(str(problem).split())[:300]
                raise WorkersLost(
                    f"the last of Ray's workers died {seat.restarts} times in a row ({reason}); finished samples are "
                    "kept. Look at the memory of the machine, then run the same command again to resume"
                ) from None
            return
        seat.actor, seat.loading = self._actor()

    def find_batch_size(self, one: TaskPlan, arms: Sequence[Arm], documents: Sequence[Document]) -> int:
        while True:
            seat = next((seat for seat in self.seats if seat.loading is None), None)
            if seat is None:
                self._first_loaded()
                continue
            try:
                return int(self._get(seat.actor.find_batch_size.remote(one, list(arms), list(documents))))
            except self.ray.exceptions.RayActorError as problem:
                self._refill(seat, problem)

    def answers(self, one: TaskPlan, jobs: Sequence[Job]) -> Iterator[Answered]:
        plan = self.ray.put(one)
        arms = self.loaded.arms
        queue = deque([Turn(arm, job) for arm in arms if job.wanted.get(arm.name)] for job in jobs)
        under_way: dict[Any, tuple[Seat, Turn]] = {}
        while True:
            busy = [id(seat) for seat, _ in under_way.values()]
            for seat in self.seats:
                if seat.loading is None and id(seat) not in busy:
                    if not seat.todo and queue:
                        seat.todo = deque(queue.popleft())
                    if seat.todo:
                        turn = seat.todo.popleft()
                        under_way[self._send(seat, plan, turn)] = (seat, turn)
            if not under_way and not queue:
                return
            loading = {seat.loading: seat for seat in self.seats if seat.loading is not None}
            reference = self.ray.wait([*under_way, *loading], num_returns=1)[0][0]
            seat, current = under_way.pop(reference, None) or (loading[reference], None)
            try:
                found = self._get(reference)
            except self.ray.exceptions.RayActorError as problem:
                if current is not None:
                    yield from self._put_back(one, seat, current, queue, problem)
                self._refill(seat, problem)
                continue
            if current is None:
                seat.loading = None
            else:
                seat.restarts = 0
                yield current.arm.name, self._note(one, current.arm, *found)

    def _put_back(
        self, one: TaskPlan, seat: Seat, turn: Turn, queue: deque[list[Turn]], problem: Exception
    ) -> Iterator[Answered]:
        """Into the queue with what a dead actor had taken: whoever is free first takes it."""
        turn.deaths += 1
        if turn.deaths < ATTEMPTS:
            seat.todo.appendleft(turn)
        if seat.todo:
            queue.appendleft(list(seat.todo))
        seat.todo = deque()
        if turn.deaths >= ATTEMPTS:
            yield turn.arm.name, self._given_up(one, turn, problem)

    def _note(
        self, one: TaskPlan, arm: Arm, lines: list[Sample], report: dict[str, Any], limits: dict[str, int]
    ) -> list[Sample]:
        if report:
            self._reports.setdefault(one.task.name, {})[arm.name] = report
        for name, size in limits.items():
            self.limits[name] = min(size, self.limits.get(name, size))
        return lines

    def _send(self, seat: Seat, plan: Any, turn: Turn) -> Any:
        return seat.actor.answer.remote(plan, turn.arm, list(turn.job.batch), turn.job.wanted[turn.arm.name])

    def _given_up(self, one: TaskPlan, turn: Turn, problem: Exception) -> list[Sample]:
        text = " ".join(str(problem).split())[:300]
        died = RuntimeError(f"{turn.deaths} workers died while they answered the batch of this document: {text}")
        wanted = turn.job.wanted[turn.arm.name]
        return [failed(one, turn.arm, document, died) for document in turn.job.batch if document.doc_id in wanted]

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "ray",
            "workers": len(self.seats),
            "workers_lost": self.lost,
            "reduced_batch_sizes": dict(self.limits),
        }

    def reports(self) -> dict[str, dict[str, Any]]:
        return self._reports

    def close(self) -> None:
        for seat in self.seats:
            self.ray.kill(seat.actor)
        if self.started:
            self.ray.shutdown()
