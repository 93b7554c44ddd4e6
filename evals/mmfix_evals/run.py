"""Running an evaluation: every method answers every document, nothing finished is ever lost.

Methods take turns on each batch, so that a machine that slows down slows all of them alike and speeds compare fairly.
Batches are cut from the whole list of documents: a resumed run rebuilds the same batches and keeps only what was
missing, so it gives the same answers as an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mmfix_evals import batching, results
from mmfix_evals.arms import BASELINE, Arm, controls, expand, resolve
from mmfix_evals.errors import EvalError
from mmfix_evals.files import remove_leftovers
from mmfix_evals.head import head, now
from mmfix_evals.plan import Asked, RunConfig, TaskPlan, plan, read_tasks
from mmfix_evals.pool import Job, Load, LocalPool, Pool
from mmfix_evals.pool import load_decoder as load_decoder
from mmfix_evals.progress import Reporter
from mmfix_evals.samples import Sample, SampleLog, digest
from mmfix_evals.scoring import Answers, Settings
from mmfix_evals.shards import cut
from mmfix_evals.tasks import Document, data

CONTROL = "plausibility"


class TooManyErrors(EvalError):  # noqa: N818 - said as a person would
    """More documents failed than ``--max-errors`` allows."""


class Interrupted(EvalError):  # noqa: N818
    """The user stopped the run; everything finished is on disk."""

    exit_code = 130


@dataclass
class Runner:
    """State of one run; :func:`run` is the way in."""

    config: RunConfig
    pool: Pool
    plans: list[TaskPlan]
    log: SampleLog
    reporter: Reporter
    head: results.Results
    batch_sizes: dict[str, int]
    documents: dict[str, list[Document]] = field(default_factory=dict)
    errors: int = 0
    scores: dict[str, results.Scores] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        for one in self.plans:
            self.documents[one.task.name] = one.part(self.config.shard, self.config.batch_size)

    @property
    def arms(self) -> list[Arm]:
        return self.pool.loaded.arms

    def run(self) -> results.Results:
        """Answer everything that is missing. On any way out, ``results.json`` says what there is."""
        self.write("running")
        try:
            for one in self.plans:
                self.run_task(one)
                self.scores.update(self.score([one]))
                if one is not self.plans[-1]:
                    self.write("running")
        except BaseException:
            self.write("interrupted", quietly=True)
            raise
        results.write_reports(self.log.path.parent, self.pool.reports())
        return self.write("complete")

    def run_task(self, one: TaskPlan) -> None:
        documents = self.documents[one.task.name]
        missing = {arm.name: self.missing(one, arm) for arm in self.arms}
        total = len(documents) * len(self.arms)
        open_ = sum(map(len, missing.values()))
        self.reporter.start(one.task.name, total, total - open_)
        if not open_:
            return
        batches = cut(documents, self.batch_size(one, documents))
        jobs = [Job(b, {name: {d.doc_id for d in b} & wanted for name, wanted in missing.items()}) for b in batches]
        for name, lines in self.pool.answers(one, [job for job in jobs if any(job.wanted.values())]):
            new = [line for line in lines if line["doc_id"] in missing[name]]  # a retried batch may come twice
            missing[name] -= {line["doc_id"] for line in new}
            self.record(new)
            self.reporter.advance(len(new))

    def batch_size(self, one: TaskPlan, documents: Sequence[Document]) -> int:
        """The given size; for ``auto`` the one found when this folder was begun, else a new one."""
        if isinstance(self.config.batch_size, int):
            return self.config.batch_size
        if one.task.name not in self.batch_sizes:
            self.batch_sizes[one.task.name] = self.pool.find_batch_size(one, self.arms, documents)
            self.reporter.say(f"{one.task.name}: batch size {self.batch_sizes[one.task.name]} found")
            self.write("running")  # a resumed run must cut the same batches
        return self.batch_sizes[one.task.name]

    def missing(self, one: TaskPlan, arm: Arm) -> set[str]:
        """Document ids without an answer. An answer found under another protocol is copied, not asked for again."""
        wanted, found = set(), []
        for document in self.documents[one.task.name]:
            sample = self.log.by_key.get(one.key(arm, document))
            if sample is None or sample.get("error") is not None:
                wanted.add(document.doc_id)
            elif sample["protocol"] != one.protocol:
                found.append({**sample, "protocol": one.protocol, **document.target})
        self.log.append(found)
        return wanted

    def record(self, lines: Sequence[Sample]) -> None:
        """Keep some lines; stop when too many of the run's documents have failed."""
        self.log.append(lines)
        for line in lines:
            if line["error"] is not None:
                self.errors += 1
                if self.errors > self.config.max_errors:
                    where = f"{line['task']} {line['doc_id']} ({line['method']})"
                    raise TooManyErrors(
                        f"{where}: {line['error']}. Stopped after {self.errors} failed answers (--max-errors "
                        f"{self.config.max_errors}); finished samples are kept in {self.log.path}"
                    )

    def samples(self, plans: Iterable[TaskPlan]) -> dict[str, list[Sample]]:
        """The samples of this run, and of this shard, by task."""
        found = results.select(self.log.by_key.values(), {one.task.name: one.protocol for one in plans})
        if self.config.shard.is_whole:
            return found
        mine = {name: {document.doc_id for document in listed} for name, listed in self.documents.items()}
        return {name: [s for s in listed if s["doc_id"] in mine[name]] for name, listed in found.items()}

    def score(self, plans: Sequence[TaskPlan]) -> dict[str, results.Scores]:
        """Scores of the finished samples, by task."""
        found = self.samples(plans)
        names = [arm.name for arm in self.arms]
        settings = Settings(self.config.resamples, self.config.seed)
        return {
            one.task.name: results.score(
                Answers.collect(one.task, one.flavour, found[one.task.name], names), settings, BASELINE
            )
            for one in plans
            if found.get(one.task.name)
        }

    def write(self, status: str, quietly: bool = False) -> results.Results:
        """Score what is finished and write ``results.json``; ``quietly`` when another error is on its way already."""
        try:
            scores = self.scores | self.score([one for one in self.plans if one.task.name not in self.scores])
            listed = [sample for found in self.samples(self.plans).values() for sample in found]
            found: results.Results = {
                **self.head,
                "status": status,
                **results.merge([scores[one.task.name] for one in self.plans if one.task.name in scores]),
                "errors": results.errors(listed, self.head),
            }
            found["timing"] = {
                **self.head["timing"],
                "finished": now(),
                "seconds": time.perf_counter() - self.started,
                "batch_sizes": self.batch_sizes,
                **self.pool.describe(),
            }
            results.write(self.log.path.parent, found)
        except Exception:
            if not quietly:
                raise
            return {}
        return found


def run(config: RunConfig, argv: Sequence[str], reporter: Reporter, load: Load | None = None) -> results.Results:
    """Run an evaluation into ``config.folder`` and return what stands in its ``results.json``.

    Args:
        config: see :class:`RunConfig`.
        argv: the command line, recorded without secrets.
        reporter: progress and warnings.
        load: ``config`` → decoder; the default loads ``config.model`` with :class:`mmfix_decoding.Decoder`.

    Raises:
        UsageError, mmfix.errors.MethodError: a wrong name or option, before anything is loaded.
        MissingDependency: the engine is not installed.
        DataError: data of a task are missing or damaged; said before the model is loaded.
        TooManyErrors: more than ``config.max_errors`` documents failed.
        Interrupted: Ctrl-C; finished samples and ``results.json`` are on disk.
        OSError: the run folder cannot be written.
    """
    config.check()
    arms = [resolve(text, evaluated=True) for text in expand(config.methods)]
    _remark_controls(arms, reporter)
    start = _engine(config)
    with data.below(config.data):
        return _run(config, argv, reporter, load or load_decoder, start)


def _run(
    config: RunConfig, argv: Sequence[str], reporter: Reporter, load: Load, start: Callable[[RunConfig, Load], Pool]
) -> results.Results:
    asked = read_tasks(config)
    config.folder.mkdir(parents=True, exist_ok=True)
    with SampleLog(config.folder) as log:
        remove_leftovers(config.folder / results.NAME)
        if log.warning:
            reporter.warn(f"{log.warning}; the answer will be asked for again")
        reporter.say(f"loading {config.model} …")
        try:
            pool = start(config, load)
            try:
                return _runner(config, argv, reporter, log, pool, asked).run()
            finally:
                pool.close()
        except KeyboardInterrupt:
            raise Interrupted(
                f"{len(log.by_key)} finished samples are kept in {log.path}. Run the same command again to resume"
            ) from None
        except OSError as problem:
            if problem.filename == str(log.path):
                detail = f"{problem.strerror}; finished samples are kept. Make room and run the same command again"
                raise OSError(problem.errno, detail, problem.filename) from problem
            raise


def _engine(config: RunConfig) -> Callable[[RunConfig, Load], Pool]:
    """The pool's class; a missing library is said before anything is made."""
    if config.engine == "local":
        return LocalPool
    from mmfix_evals import ray_pool

    ray_pool.require()
    return ray_pool.RayPool


def _remark_controls(arms: Sequence[Arm], reporter: Reporter) -> None:
    """What a comparison lacks to be read."""
    if all(arm.name != BASELINE for arm in arms) and len(arms) > 1:
        reporter.say(f"no differences will be reported: add {BASELINE} to --methods as the baseline")
    names = {arm.name: {m.info.name for m in arm.methods if m.info.kind == "contrast"} for arm in arms}
    contrast = [name for name, used in names.items() if used - {CONTROL}]
    if contrast and not any(used == {CONTROL} for used in names.values()):
        reporter.say(
            f"{', '.join(contrast)}: part of what a contrast method gains comes from the plausibility cut alone; add "
            f"{CONTROL} to --methods as the control"
        )
    for control, owners in controls().items():
        searching = [arm.name for arm in arms if owners & {m.info.name for m in arm.methods}]
        if searching and not any(arm.generation.get("num_beams") for arm in arms):
            reporter.say(
                f"{', '.join(searching)}: a search is to be compared with beam search of its width; add {control} to "
                "--methods as the control"
            )


def _runner(
    config: RunConfig, argv: Sequence[str], reporter: Reporter, log: SampleLog, pool: Pool, asked: Sequence[Asked]
) -> Runner:
    plans = plan(config, pool.loaded.identity, asked)
    sizes = results.batch_sizes(config.folder) if config.batch_size == batching.AUTO else {}
    runner = Runner(config, pool, plans, log, reporter, {}, sizes)
    keys = {
        one.task.name: sorted(one.key(arm, d) for arm in runner.arms for d in runner.documents[one.task.name])
        for one in plans
    }
    expected = {key for listed in keys.values() for key in listed}
    stale = sum(key not in expected for key in log.by_key)
    if stale:
        reporter.warn(f"{stale} samples in {log.path} belong to another configuration and are ignored")
    runner.head = head(config, argv, plans, pool.loaded)
    for name, reason in pool.loaded.left_out.items():
        reporter.say(f"left out: {reason}" if reason.startswith(name) else f"left out: {name}: {reason}")
    if not config.shard.is_whole:
        runner.head["shard"] = {
            "index": config.shard.index,
            "count": config.shard.count,
            "tasks": {name: {"n": len(listed), "keys_sha256": digest(listed)} for name, listed in keys.items()},
        }
        reporter.say(f"shard {config.shard}: {len(expected)} answers, into {config.folder}")
    return runner
