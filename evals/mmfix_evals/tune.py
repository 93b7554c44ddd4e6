"""Searching a method's parameters on one data split, and looking at another one once.

Every trial is an ordinary run in a folder of its own, so that it resumes like one. The study is a table of trials
(``trials.jsonl``) from which the sampler is rebuilt before each trial with a seed of that trial: a search that was
interrupted goes on exactly as it would have. The best values are asked on the test split at the end, once; after that
the study is closed, since a second look would be searching on the test split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmfix_evals import files, results, tune_sampling
from mmfix_evals.arms import BASELINE, resolve
from mmfix_evals.errors import DataError, EvalError, UsageError
from mmfix_evals.plan import RunConfig
from mmfix_evals.pool import Load
from mmfix_evals.progress import Reporter
from mmfix_evals.tasks import get as get_task
from mmfix_evals.tune_goal import Objective
from mmfix_evals.tune_sampling import Trial
from mmfix_evals.tune_space import Space

STUDY, TRIALS, TUNED = "study.json", "trials.jsonl", "tuned.json"
TEST = "test"


@dataclass(frozen=True)
class TuneConfig:
    """The options of ``mmfix tune``.

    Attributes:
        base: model, task, split to search on, limit, seed and so on; its methods are not used.
        test_split: where the best values are asked once; None leaves that out.
        trials: of the whole study; the first one is the method as given.
    """

    space: Space
    base: RunConfig
    objective: Objective
    trials: int
    test_split: str | None = TEST

    def check(self) -> None:
        """Refuse what cannot be meant, before a model is loaded."""
        if self.trials < 1:
            raise UsageError(f"--trials {self.trials}: give a number of 1 or more")
        searched = self.base.split
        splits = get_task(self.objective.task).data_splits
        if searched == TEST or searched == self.test_split:
            others = [split for split in splits if split not in (TEST, self.test_split)]
            advice = f"use --split {' or '.join(others)}" if others else "this task has no other; choose another task"
            raise UsageError(
                f"--split {searched}: values chosen on the test split say nothing about new data; {advice}"
            )
        self.base.check()
        if self.test_split is not None:
            replace(self.base, split=self.test_split).check()

    def describe(self) -> dict[str, Any]:
        """What makes two searches the same one; the number of trials may grow."""
        base = self.base
        return {
            "method": self.space.text,
            "dimensions": [dimension.describe() for dimension in self.space.dimensions],
            "objective": {
                "task": self.objective.task,
                "metric": self.objective.metric.name,
                "split": self.objective.split,
                "direction": self.objective.direction,
            },
            "model": base.model,
            "revision": base.revision,
            "split": base.split,
            "limit": base.limit,
            "seed": base.seed,
            "world_seed": base.world_seed,
            "dtype": base.dtype,
            "parser": base.parser,
            "data": None if base.data is None else str(base.data),
            "max_new_tokens": base.max_new_tokens,
            "gen_kwargs": results.clean_values(base.gen_kwargs),
        }


@dataclass
class Study:
    """A search in its folder; :func:`tune` is the way in."""

    config: TuneConfig
    argv: Sequence[str]
    reporter: Reporter
    load: Load
    trials: list[Trial] = field(default_factory=list)
    _decoder: Any = None

    @property
    def folder(self) -> Path:
        return self.config.base.out

    def open(self) -> dict[str, Any] | None:
        """Begin the folder or read what it holds; the result of a study that is closed.

        Raises:
            UsageError: the folder belongs to another search, or more trials are wanted after the test split was seen.
        """
        path, mine = self.folder / STUDY, self.config.describe()
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_text_atomic(path, _json(mine))
            return None
        found = files.read_json(path)
        settings = {name: value for name, value in found.items() if name != "closed"}
        other = sorted(name for name in {*settings, *mine} if settings.get(name) != mine.get(name))
        if other:
            raise UsageError(f"{self.folder} holds another search ({', '.join(other)} differ); choose another --out")
        if (self.folder / TRIALS).exists():
            self.trials = [Trial(**row) for row in files.read_rows(self.folder / TRIALS)]
        closed = found.get("closed")
        wanted = {self.config.trials, self.config.test_split or (closed or {}).get("test_split")}
        if closed and wanted != {closed["trials"], closed["test_split"]}:
            raise UsageError(
                f"{self.folder}: this search was ended after {closed['trials']} trials, when its best values were "
                f"asked on {closed['test_split']}; going on would be searching there. Begin a new folder"
            )
        done = self.folder / TUNED
        return dict(files.read_json(done)) if closed and done.exists() else None

    def search(self) -> None:
        """Run the trials that are missing."""
        while len(self.trials) < self.config.trials:
            trial = self.evaluate(len(self.trials))
            self.trials.append(trial)
            listed = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in self.trials)
            files.write_text_atomic(self.folder / TRIALS, listed)
            shown = trial.reason if trial.value is None else f"{trial.value:.4f}"
            self.reporter.say(f"trial {trial.number + 1} of {self.config.trials}: {trial.method}: {shown}")

    def evaluate(self, number: int) -> Trial:
        """One trial: the method as given first, then what the sampler suggests."""
        from mmfix.errors import MethodError

        values = self.suggest(number) if number else self.defaults()
        method = self.config.space.method(values) if number else self.config.space.text
        for earlier in self.trials:
            if earlier.values == values:
                return replace(earlier, number=number, method=method)
        try:
            found = self.run([method], self.folder / "trials" / f"{number:04d}", self.config.base.split)
        except MethodError as problem:
            if number == 0:
                raise  # the method as given cannot run at all
            return Trial(number, method, values, None, reason=str(problem))
        entry = self.config.objective.entry(found, method)
        if entry is None or entry["value"] is None:
            return Trial(number, method, values, None, reason="the objective is undefined (nothing to divide by)")
        return Trial(number, method, values, entry["value"], entry["ci_low"], entry["ci_high"], entry["n"])

    def defaults(self) -> dict[str, Any]:
        """The values of the method as given, as calibrated for the model."""
        model = getattr(self.decoder(), "model", None)
        method = resolve(self.config.space.text, model).methods[0]
        return {d.name: getattr(method, d.name) for d in self.config.space.dimensions}

    def suggest(self, number: int) -> dict[str, Any]:
        config = self.config
        return tune_sampling.suggest(config.space.dimensions, config.objective, config.base.seed, self.trials, number)

    @property
    def best(self) -> Trial:
        """The trial with the best value; of equal ones the first, so that the method as given is not left for luck."""
        scored = [trial for trial in self.trials if trial.value is not None]
        if not scored:
            raise EvalError(f"no trial in {self.folder} has a value; see the reasons in {TRIALS}, or raise --limit")
        best = scored[0]
        for trial in scored[1:]:
            assert trial.value is not None
            assert best.value is not None
            if self.config.objective.better(trial.value, best.value):
                best = trial
        return best

    def conclude(self) -> dict[str, Any]:
        """Ask greedy, the method as given and the best values on both splits, side by side, and write the result."""
        best, test_split = self.best, self.config.test_split
        methods = list(dict.fromkeys([BASELINE, self.config.space.text, best.method]))
        tuned: dict[str, Any] = {
            **self.config.describe(),
            "trials": len(self.trials),
            "without_value": sum(trial.value is None for trial in self.trials),
            "best": asdict(best),
            "test_split": test_split,
            "rows": [],
        }
        if test_split is not None:
            closed = {"trials": len(self.trials), "test_split": test_split, "best": best.method}
            files.write_text_atomic(self.folder / STUDY, _json({**self.config.describe(), "closed": closed}))
        splits = [split for split in (self.config.base.split, test_split) if split is not None]
        found = {split: self.run(methods, self.folder / split, split) for split in splits}
        tuned["rows"] = [self._row(method, found) for method in methods]
        files.write_text_atomic(self.folder / TUNED, _json(tuned))
        return tuned

    def _row(self, method: str, found: dict[str, results.Results]) -> dict[str, Any]:
        """One method on every split, and by how much it is better where it was searched."""
        row: dict[str, Any] = {"method": method}
        for split, one in found.items():
            row[split] = {
                "score": _kept(
                    self.config.objective.entry(one, method), ("value", "ci_low", "ci_high", "n", "n_images")
                ),
                "difference": _kept(
                    self.config.objective.difference(one, method), ("difference", "ci_low", "ci_high", "p", "p_holm")
                ),
            }
        scores = [row[split]["score"] and row[split]["score"]["value"] for split in found]
        row["gap"] = scores[0] - scores[1] if len(scores) == 2 and None not in scores else None
        return row

    def run(self, methods: Sequence[str], folder: Path, split: str) -> results.Results:
        from mmfix_evals.run import run

        config = replace(self.config.base, methods=tuple(methods), out=folder, split=split)
        return run(config, self.argv, Reporter(quiet=True), lambda _: self.decoder())

    def decoder(self) -> Any:
        """Loaded once for all trials."""
        if self._decoder is None:
            self.reporter.say(f"loading {self.config.base.model} …")
            self._decoder = self.load(self.config.base)
        return self._decoder


def tune(config: TuneConfig, argv: Sequence[str], reporter: Reporter, load: Load | None = None) -> dict[str, Any]:
    """Search, then look at the test split once; what stands in ``tuned.json``.

    Raises:
        UsageError: a wrong option, a search on a test split, or a folder of another search.
        MissingDependency: Optuna is not installed.
        MethodError: the method as given does not run on this model.
        EvalError: no trial gave a value.
    """
    from mmfix_evals import run as runs

    config.check()
    tune_sampling.require()
    study = Study(config, argv, reporter, load or runs.load_decoder)
    finished = study.open()
    if finished is not None:
        reporter.say(f"this search is finished; read from {study.folder / TUNED}")
        return finished
    if len(study.trials) > config.trials:
        raise UsageError(f"{study.folder} holds {len(study.trials)} trials already; give --trials that many or more")
    if study.trials:
        reporter.say(f"{len(study.trials)} finished trials found in {study.folder}")
    study.search()
    return study.conclude()


def _kept(entry: dict[str, Any] | None, names: Sequence[str]) -> dict[str, Any] | None:
    return None if entry is None else {name: entry.get(name) for name in names}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as problem:
        raise DataError(f"the result cannot be written as JSON ({problem})") from None
