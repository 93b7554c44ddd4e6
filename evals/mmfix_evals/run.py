"""Running an evaluation: every method answers every document, nothing finished is ever lost.

Methods take turns on each batch, so that a machine that slows down slows all of them alike and speeds compare fairly.
Batches are cut from the whole list of documents: a resumed run rebuilds the same batches and keeps only what was
missing, so it gives the same answers as an uninterrupted one.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmfix_evals import machine, results
from mmfix_evals.arms import BASELINE, Arm, resolve
from mmfix_evals.ask import ask, failed, warm_up
from mmfix_evals.errors import EvalError
from mmfix_evals.fingerprint import fingerprint
from mmfix_evals.plan import RunConfig, TaskPlan, plan
from mmfix_evals.progress import Reporter
from mmfix_evals.samples import Sample, SampleLog
from mmfix_evals.scoring import Answers, Settings
from mmfix_evals.tasks import Document

Load = Callable[[RunConfig], Any]


class TooManyErrors(EvalError):  # noqa: N818 - said as a person would
    """More documents failed than ``--max-errors`` allows."""


class Interrupted(EvalError):  # noqa: N818
    """The user stopped the run; everything finished is on disk."""

    exit_code = 130


@dataclass
class Runner:
    """State of one run; :func:`run` is the way in."""

    config: RunConfig
    arms: list[Arm]
    decoders: dict[str, Any]
    plans: list[TaskPlan]
    log: SampleLog
    reporter: Reporter
    head: results.Results
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, results.Scores] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

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
        return self.write("complete")

    def run_task(self, one: TaskPlan) -> None:
        missing = {arm.name: self.missing(one, arm) for arm in self.arms}
        total = len(one.documents) * len(self.arms)
        open_ = sum(map(len, missing.values()))
        self.reporter.start(one.task.name, total, total - open_)
        if not open_:
            return
        size = self.config.batch_size
        batches = [one.documents[i : i + size] for i in range(0, len(one.documents), size)]
        for arm in self.arms:
            if missing[arm.name]:
                self.try_warm_up(one, arm, next(b for b in batches if any(d.doc_id in missing[arm.name] for d in b)))
        for batch in batches:
            for arm in self.arms:
                wanted = {d.doc_id for d in batch} & missing[arm.name]
                if wanted:
                    self.run_batch(one, arm, batch, wanted)
                    self.reporter.advance(len(wanted))

    def missing(self, one: TaskPlan, arm: Arm) -> set[str]:
        """Document ids without an answer. An answer found under another protocol is copied, not asked for again."""
        wanted, found = set(), []
        for document in one.documents:
            sample = self.log.by_key.get(one.key(arm, document))
            if sample is None or sample.get("error") is not None:
                wanted.add(document.doc_id)
            elif sample["protocol"] != one.protocol:
                found.append({**sample, "protocol": one.protocol, **document.target})
        self.log.append(found)
        return wanted

    def try_warm_up(self, one: TaskPlan, arm: Arm, batch: Sequence[Document]) -> None:
        try:
            warm_up(self.decoders[arm.name], one, batch)
        except Exception as problem:
            if is_fatal(problem):
                raise
            # The batch itself will fail in the same way and be recorded document by document.

    def run_batch(self, one: TaskPlan, arm: Arm, batch: Sequence[Document], wanted: set[str]) -> None:
        """Answer a whole batch; keep what was missing. If it fails, find out which documents are at fault."""
        try:
            lines = self.ask(one, arm, batch)
        except Exception as problem:
            if is_fatal(problem):
                raise
            for document in batch:
                if document.doc_id in wanted:
                    self.run_single(one, arm, document, problem if len(batch) == 1 else None)
            return
        self.log.append(line for line in lines if line["doc_id"] in wanted)

    def run_single(self, one: TaskPlan, arm: Arm, document: Document, known: Exception | None) -> None:
        """Answer one document of a failed batch; ``known`` is why it failed, where that is known already."""
        try:
            if known is not None:
                raise known
            lines = self.ask(one, arm, [document])
        except Exception as problem:
            if is_fatal(problem):
                raise
            self.record_error(failed(one, arm, document, problem))
        else:
            self.log.append(lines)

    def ask(self, one: TaskPlan, arm: Arm, documents: Sequence[Document]) -> list[Sample]:
        lines, report = ask(self.decoders[arm.name], one, arm, documents)
        if report:
            self.reports.setdefault(one.task.name, {})[arm.name] = report
        return lines

    def record_error(self, line: Sample) -> None:
        self.log.append([line])
        self.errors.append({name: line[name] for name in ("task", "split", "doc_id", "image", "method", "error")})
        if len(self.errors) > self.config.max_errors:
            where = f"{line['task']} {line['doc_id']} ({line['method']})"
            raise TooManyErrors(
                f"{where}: {line['error']}. Stopped after {len(self.errors)} failed answers (--max-errors "
                f"{self.config.max_errors}); finished samples are kept in {self.log.path}"
            )

    def score(self, plans: Sequence[TaskPlan]) -> dict[str, results.Scores]:
        """Scores of the finished samples, by task."""
        found = results.select(self.log.by_key.values(), {one.task.name: one.protocol for one in plans})
        names = [arm.name for arm in self.arms]
        settings = Settings(self.config.resamples, self.config.seed)
        return {
            one.task.name: results.score(
                Answers.collect(one.task, one.flavour, found[one.task.name], names), settings, BASELINE
            )
            for one in plans
            if one.task.name in found
        }

    def write(self, status: str, quietly: bool = False) -> results.Results:
        """Score what is finished and write ``results.json``; ``quietly`` when another error is on its way already."""
        try:
            scores = self.scores | self.score([one for one in self.plans if one.task.name not in self.scores])
            found: results.Results = {
                **self.head,
                "status": status,
                **results.merge(list(scores.values())),
                "errors": self.errors,
                "last_reports": self.reports,
            }
            found["timing"] = {**self.head["timing"], "finished": now(), "seconds": time.perf_counter() - self.started}
            results.write(self.log.path.parent, found)
        except Exception:
            if not quietly:
                raise
            return {}
        return found


def run(config: RunConfig, argv: Sequence[str], reporter: Reporter, load: Load | None = None) -> results.Results:
    """Run an evaluation into ``config.out`` and return what stands in its ``results.json``.

    Args:
        config: see :class:`RunConfig`.
        argv: the command line, recorded without secrets.
        reporter: progress and warnings.
        load: ``config`` → decoder; the default loads ``config.model`` with :class:`mmfix_decoding.Decoder`.

    Raises:
        UsageError, mmfix.errors.MethodError: a wrong name or option, before anything is loaded.
        TooManyErrors: more than ``config.max_errors`` documents failed.
        Interrupted: Ctrl-C; finished samples and ``results.json`` are on disk.
        OSError: the run folder cannot be written.
    """
    config.check()
    for text in config.methods:
        resolve(text)
    config.out.mkdir(parents=True, exist_ok=True)
    with SampleLog(config.out) as log:
        if log.warning:
            reporter.warn(f"{log.warning}; the answer will be asked for again")
        try:
            return _runner(config, argv, reporter, log, load or load_decoder).run()
        except KeyboardInterrupt:
            raise Interrupted(
                f"{len(log.by_key)} finished samples are kept in {log.path}. Run the same command again to resume"
            ) from None
        except OSError as problem:
            if problem.filename == str(log.path):
                detail = f"{problem.strerror}; finished samples are kept. Make room and run the same command again"
                raise OSError(problem.errno, detail, problem.filename) from problem
            raise


def _runner(config: RunConfig, argv: Sequence[str], reporter: Reporter, log: SampleLog, load: Load) -> Runner:
    reporter.say(f"loading {config.model} …")
    decoder = load(config)
    arms = [resolve(text, getattr(decoder, "model", None)) for text in config.methods]
    decoders = {arm.name: decoder.with_method(list(arm.methods) or None) for arm in arms}
    identity = fingerprint(decoder)
    plans = plan(config, identity)
    expected = {key for one in plans for arm in arms for key in one.keys(arm)}
    stale = sum(key not in expected for key in log.by_key)
    if stale:
        reporter.warn(f"{stale} samples in {log.path} belong to another configuration and are ignored")
    if BASELINE not in config.methods and len(config.methods) > 1:
        reporter.say("no differences will be reported: add greedy to --methods as the baseline")
    head = _head(config, argv, arms, plans, identity, decoder)
    return Runner(config, arms, decoders, plans, log, reporter, head)


def load_decoder(config: RunConfig) -> Any:
    """The decoder of ``config.model``; imported here because it brings torch."""
    from mmfix_decoding import Decoder

    return Decoder.from_pretrained(config.model, device=config.device, dtype=config.dtype, revision=config.revision)


def _head(
    config: RunConfig, argv: Sequence[str], arms: list[Arm], plans: list[TaskPlan], model: dict[str, Any], decoder: Any
) -> results.Results:
    """Everything in ``results.json`` that is known before the first answer."""
    parameters = getattr(getattr(decoder, "model", None), "dtype", None)
    device = str(getattr(getattr(decoder, "model", None), "device", "cpu"))
    return {
        "schema_version": results.SCHEMA_VERSION,
        "status": "running",
        "argv": results.clean_argv(argv),
        "config": {
            "model": config.model,
            "tasks": list(config.tasks),
            "methods": list(config.methods),
            "split": config.split,
            "limit": config.limit,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "world_seed": config.world_seed,
            "device": config.device,
            "dtype": config.dtype,
            "max_new_tokens": config.max_new_tokens,
            "gen_kwargs": results.clean_values(config.gen_kwargs),
            "parser": config.parser,
            "max_errors": config.max_errors,
        },
        "bootstrap": {"resamples": config.resamples, "seed": config.seed},
        "model": {**model, "dtype": str(parameters).removeprefix("torch."), "device": device},
        "methods": [{"name": arm.name, "spec": list(arm.spec)} for arm in arms],
        "tasks": {one.task.name: one.describe() for one in plans},
        "versions": machine.versions(),
        "git": machine.git(),
        "machine": machine.machine(device),
        "timing": {"started": now()},
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def is_fatal(problem: Exception) -> bool:
    """Whether asking other documents cannot help: the method or the model is refused, not one picture."""
    import mmfix.errors

    if isinstance(problem, mmfix.errors.ImageError):
        return False
    return isinstance(problem, (mmfix.errors.MmfixError, EvalError))
