"""``results.json``: what was run, on what, by what, and the numbers. Written atomically; rebuilt from samples alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfix_evals import files, samples, tasks
from mmfix_evals.arms import BASELINE
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.length_matched import matched_entries, matches
from mmfix_evals.scoring import Answers, Settings, difference_entries, holm, metric_entries
from mmfix_evals.speed import speed_entries

NAME = "results.json"
REPORTS = "reports.json"
SCHEMA_VERSION = 1
Results = dict[str, Any]

_SECRET_NAME = re.compile(r"token|secret|passw|credential|api[-_]?key|auth", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"^(hf_|sk-|ghp_|github_pat_|xox[a-z]-|AKIA|eyJ)\w|^(?=.*\d)(?=.*[a-z])(?=.*[A-Z])[\w\-]{32,}$"
)
_HARMLESS = ("--max-new-tokens", "max_new_tokens", "min_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id")
HIDDEN = "***"


@dataclass(frozen=True)
class Scores:
    """Everything that is computed from samples."""

    metrics: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    speed: list[dict[str, Any]]
    length_matched: list[dict[str, Any]] = field(default_factory=list)


def score(answers: Answers, settings: Settings, baseline: str = BASELINE) -> Scores:
    """Metrics of every method of one task, and differences to the baseline where it was run."""
    pairs = [(baseline, method) for method in answers.by_method if baseline in answers.by_method and method != baseline]
    comparisons = holm(difference_entries(answers, answers, pairs, settings))
    matched = holm(matched_entries(answers, answers, pairs, settings)) if matches(answers) else []
    return Scores(metric_entries(answers, settings), comparisons, speed_entries(answers, baseline, settings), matched)


def merge(scores: Sequence[Scores]) -> dict[str, Any]:
    """The scores of several tasks as they stand in ``results.json``."""
    return {
        "metrics": [entry for one in scores for entry in one.metrics],
        "comparisons": [entry for one in scores for entry in one.comparisons],
        "length_matched": [entry for one in scores for entry in one.length_matched],
        "speed": [entry for one in scores for entry in one.speed],
    }


TIMES = ("seconds", "tokens_per_second", "tokens_per_second_low", "tokens_per_second_high")
RELATIVE_TIMES = ("relative_speed", "relative_speed_low", "relative_speed_high")


def without_times(found: Results) -> Results:
    """Results less everything that the clock decides: what two runs of one command have in common to the last digit."""
    timed = {*TIMES, *RELATIVE_TIMES}
    speed = [{name: value for name, value in entry.items() if name not in timed} for entry in found["speed"]]
    return {**{name: value for name, value in found.items() if name != "timing"}, "speed": speed}


def errors(listed: Iterable[samples.Sample], head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents without an answer, in the order of tasks, methods and ids."""
    place = {name: i for i, name in enumerate(head["tasks"])}
    order = {arm["name"]: i for i, arm in enumerate(head["methods"])}
    failed = [s for s in listed if s.get("error") is not None and s["task"] in place and s["method"] in order]
    failed.sort(key=lambda s: (place[s["task"]], order[s["method"]], s["split"], _natural(s["doc_id"])))
    return [{name: s[name] for name in ("task", "split", "doc_id", "image", "method", "error")} for s in failed]


def _natural(text: str) -> list[tuple[int, str]]:
    """A sort key that puts ``random/9`` before ``random/10``."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", text)]


def write_reports(folder: Path, reports: Mapping[str, Any]) -> None:
    """The engine's last report of each task and method (backends, masses); only of what this process answered."""
    if reports:
        files.write_text_atomic(folder / REPORTS, json.dumps(reports, indent=1, ensure_ascii=False) + "\n")


def batch_sizes(folder: Path) -> dict[str, int]:
    """The batch sizes that ``auto`` found when this folder was begun."""
    try:
        found = read(folder)["timing"]["batch_sizes"]
        return {str(name): int(size) for name, size in found.items() if int(size) > 0}
    except (DataError, KeyError, TypeError, ValueError, AttributeError):
        return {}  # none yet, or not by this version: they are found anew


def write(folder: Path, results: Results) -> None:
    """Write ``results.json`` so that the file is always complete, old or new."""
    files.write_text_atomic(folder / NAME, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read(folder: Path) -> Results:
    """The results of a run directory.

    Raises:
        DataError: no run directory, or results of another schema.
    """
    path = folder / NAME
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run folder. Make one with `mmfix eval run --out {folder}`")
    if not path.is_file():
        if (folder / samples.NAME).is_file():
            raise DataError(f"{path}: missing: this run has not ended. Run the same command again to finish it")
        if any(folder.glob("shard-*-of-*")):
            raise DataError(f"{path}: missing: {folder} holds shards. Run `mmfix eval merge {folder} --out {folder}`")
        raise DataError(f"{path}: missing. Is {folder} the folder of `mmfix eval run`?")
    found = files.read_json(path)
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "A newer mmfix wrote it: update this one" if newer else "Run it again"
        raise DataError(f"{path}: schema version {version!r}, but this mmfix reads {SCHEMA_VERSION}. {advice}")
    return dict(found)


@dataclass(frozen=True)
class Run:
    """A run directory, read back: its results (None if they were never written) and the samples that belong to it."""

    folder: Path
    results: Results | None
    samples: dict[str, list[samples.Sample]]
    """Task name → samples of the newest protocol of that task."""
    methods: list[str]
    warning: str | None

    @property
    def parser_choices(self) -> set[str]:
        return {flavour for name in self.samples for flavour in tasks.get(name).flavours}

    def flavour(self, task: tasks.Task, parser: str | None) -> str:
        """The flavour of a task: the wanted one, else that of the run, else the default."""
        if parser is not None and parser in task.flavours:
            return parser
        recorded = ((self.results or {}).get("tasks") or {}).get(task.name, {}).get(task.flavour_field)
        return task.flavour(recorded)

    def answers(self, parser: str | None = None) -> list[Answers]:
        """The scored samples, one entry per task; ``parser`` replaces the rule that the run used."""
        if parser is not None and parser not in self.parser_choices:
            from mmfix_evals.choices import unknown

            raise UsageError(unknown("parser", parser, self.parser_choices))
        return [
            Answers.collect(task, self.flavour(task, parser), self.samples[task.name], self.methods)
            for task in map(tasks.get, self.samples)
        ]

    def settings(self) -> Settings:
        bootstrap = (self.results or {}).get("bootstrap") or {}
        return Settings(**bootstrap) if bootstrap else Settings()


def open_run(folder: Path) -> Run:
    """Read a run directory. Scores come from ``samples.jsonl``; ``results.json`` only says which samples belong."""
    path = folder / samples.NAME
    if not path.is_file():
        problem = f"{path}: missing" if folder.is_dir() else f"{folder}: no such run folder"
        raise DataError(f"{problem}. A run folder is made by `mmfix eval run --out FOLDER`")
    results = read(folder) if (folder / NAME).is_file() else None
    listed, _, warning = samples.read(path)
    if not listed:
        raise DataError(f"{path}: holds no samples. Run `mmfix eval run --out {folder}` again")
    protocols = {name: entry["protocol"] for name, entry in ((results or {}).get("tasks") or {}).items()}
    if not protocols:
        protocols = {sample["task"]: sample["protocol"] for sample in listed}
    chosen = select(listed, protocols)
    present = [sample["method"] for found in chosen.values() for sample in found]
    methods = [arm["name"] for arm in results["methods"]] if results else list(dict.fromkeys(present))
    return Run(folder, results, chosen, methods, warning)


def select(listed: Iterable[samples.Sample], protocols: Mapping[str, str]) -> dict[str, list[samples.Sample]]:
    """The samples of the given protocols by task; of several lines with one key the last counts."""
    found: dict[str, dict[str, samples.Sample]] = {name: {} for name in protocols}
    for sample in listed:
        if protocols.get(sample["task"]) == sample["protocol"]:
            found[sample["task"]][sample["key"]] = sample
    return {name: list(by_key.values()) for name, by_key in found.items() if by_key}


def clean_argv(argv: Sequence[str]) -> list[str]:
    """The command line with everything that looks like a secret replaced."""
    cleaned, hide = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        if hide:
            cleaned.append(HIDDEN)
            hide = False
        elif equals and _is_secret(name, value):
            cleaned.append(f"{name}={HIDDEN}")
        elif equals:
            cleaned.append(",".join(_clean_pair(pair) for pair in word.split(",")))
        else:
            hide = word.startswith("-") and bool(_SECRET_NAME.search(word)) and word not in _HARMLESS
            cleaned.append(HIDDEN if _SECRET_VALUE.search(word) else word)
    return cleaned


def clean_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same for named values."""
    return {name: HIDDEN if _is_secret(name, str(value)) else value for name, value in values.items()}


def _clean_pair(pair: str) -> str:
    name, equals, value = pair.partition("=")
    return f"{name}={HIDDEN}" if equals and _is_secret(name, value) else pair


def _is_secret(name: str, value: str) -> bool:
    if _SECRET_VALUE.search(value):
        return True
    return bool(_SECRET_NAME.search(name)) and name not in _HARMLESS
