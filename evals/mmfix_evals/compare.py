"""Paired comparison: methods within one run, or the same methods across runs. Refuses what cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfix_evals.arms import BASELINE
from mmfix_evals.choices import unknown
from mmfix_evals.errors import UsageError
from mmfix_evals.length_matched import matched_entries, matches
from mmfix_evals.results import Run, open_run
from mmfix_evals.samples import Sample
from mmfix_evals.scoring import Answers, Settings, difference_entries, holm

Entry = dict[str, Any]


class ComparisonError(UsageError):
    """Two runs differ in something that makes a difference of their numbers meaningless; names the field."""


@dataclass
class Comparison:
    """Differences with intervals and tests.

    Attributes:
        entries: as ``comparisons`` in ``results.json``; across runs with ``run`` and ``baseline_run``.
        warnings: what differs without making the comparison meaningless.
        notes: what was left out.
        matched: the entries are those of captions cut to equal length.
    """

    entries: list[Entry]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    matched: bool = False

    def to_dict(self) -> dict[str, Any]:
        name = "length_matched" if self.matched else "comparisons"
        return {name: self.entries, "warnings": self.warnings, "notes": self.notes}

    def add(self, a: Answers, b: Answers, pairs: Sequence[tuple[str, str]], settings: Settings, **more: Any) -> None:
        """Enter the differences of some pairs of methods, ``more`` standing in each of them."""
        if not self.matched:
            found = difference_entries(a, b, pairs, settings)
        else:
            found = matched_entries(a, b, pairs, settings) if matches(a) else []
        self.entries += [{**entry, **more} for entry in found]


def compare(
    folders: Sequence[Path],
    *,
    baseline: str = BASELINE,
    parser: str | None = None,
    intersect: bool = False,
    other_prompts: bool = False,
    settings: Settings | None = None,
    match_length: bool = False,
) -> Comparison:
    """Compare the methods of one run with its baseline, or several runs with the first one.

    Args:
        folders: run directories.
        baseline: within one run, the method that the others are compared with.
        parser: score all answers anew with this rule.
        intersect: across runs, compare the documents that both have instead of refusing.
        other_prompts: across runs, let the prompts differ, because they are what is compared.
        settings: bootstrap; default: that of the first run.
        match_length: compare captions cut to equal length; see :mod:`mmfix_evals.length_matched`.

    Raises:
        ComparisonError: data, documents, pictures, prompts or scoring rules differ.
        UsageError: no such baseline, nothing in common, or no captions whose length could be matched.
    """
    runs = [open_run(folder) for folder in folders]
    chosen = settings or runs[0].settings()
    found = Comparison([], [run.warning for run in runs if run.warning], matched=match_length)
    if len(runs) == 1:
        _within(runs[0], baseline, parser, chosen, found)
    for other in runs[1:]:
        _across(runs[0], other, parser, (intersect, other_prompts), chosen, found)
    if match_length and not found.entries:
        raise UsageError(f"{runs[0].folder}: no captions to match in length; run a CHAIR task with two methods")
    found.entries = holm(found.entries)
    return found


def _within(run: Run, baseline: str, parser: str | None, settings: Settings, found: Comparison) -> None:
    if baseline not in run.methods:
        raise UsageError(f"{run.folder}: {unknown('baseline method', baseline, run.methods)}")
    if len(run.methods) < 2:
        raise UsageError(f"{run.folder} holds one method only ({baseline}): give a second run folder to compare with")
    for one in run.answers(parser):
        if baseline in one.by_method:
            found.add(one, one, [(baseline, method) for method in one.by_method if method != baseline], settings)


def _across(
    a: Run, b: Run, parser: str | None, allow: tuple[bool, bool], settings: Settings, found: Comparison
) -> None:
    intersect, other_prompts = allow
    mine = {one.task.name: one for one in a.answers(parser)}
    theirs = {one.task.name: one for one in b.answers(parser)}
    names = [name for name in mine if name in theirs]
    if not names:
        raise ComparisonError(f"{a.folder} and {b.folder} differ in field 'tasks': {_list(mine)} and {_list(theirs)}")
    left_out = sorted(set(mine) ^ set(theirs))
    if left_out:
        found.notes.append(f"only in one of {a.folder} and {b.folder}, left out: {_list(left_out)}")
    for name in names:
        one, other = mine[name], theirs[name]
        _check_rule(a, b, one, other)
        pairs = _pairs(a, b, one, other)
        if intersect:
            one, other, note = _common(one, other, pairs, other_prompts)
            found.notes.append(f"{name}: {note}")
        else:
            _check_data(a, b, one, other, pairs)
            if not other_prompts:
                _check_prompts(a, b, one, other, pairs)
        found.warnings += _milder_differences(a, b, name)
        found.add(one, other, pairs, settings, baseline_run=str(a.folder), run=str(b.folder))


def _pairs(a: Run, b: Run, one: Answers, other: Answers) -> list[tuple[str, str]]:
    """Methods of one name; where no name is common but each run has a single method, those two."""
    common = [(method, method) for method in one.by_method if method in other.by_method]
    if common:
        return common
    if len(one.by_method) == len(other.by_method) == 1:
        return [(next(iter(one.by_method)), next(iter(other.by_method)))]
    raise ComparisonError(
        f"{a.folder} and {b.folder} differ in field 'methods': {_list(one.by_method)} and {_list(other.by_method)}; "
        "give runs with a method in common, or with one method each"
    )


def _check_rule(a: Run, b: Run, one: Answers, other: Answers) -> None:
    if one.flavour != other.flavour:
        field_name = one.task.flavour_field
        raise ComparisonError(
            f"{a.folder} and {b.folder} differ in field '{one.task.name}.{field_name}': {one.flavour} and "
            f"{other.flavour}; score both alike with --{field_name} NAME"
        )


def _check_data(a: Run, b: Run, one: Answers, other: Answers, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse different questions, pictures or answered documents, in this order."""
    name = one.task.name
    for label, key in (("data", "data"), ("image_ids_sha256", "image_ids_sha256")):
        first, second = (_task_entry(run, name).get(key) for run in (a, b))
        if first is not None and second is not None and first != second:
            part = next((k for k in first if first[k] != second.get(k)), "") if isinstance(first, dict) else ""
            where = f"{name}.{label}{'.' if part else ''}{part}"
            raise ComparisonError(f"{a.folder} and {b.folder} differ in field '{where}'; {_remedy()}")
    for method_a, method_b in pairs:
        first, second = _documents(one, method_a), _documents(other, method_b)
        if first.keys() != second.keys():
            missing = len(first.keys() ^ second.keys())
            raise ComparisonError(
                f"{a.folder} ({method_a}) and {b.folder} ({method_b}) differ in field '{name}.doc_id': "
                f"{missing} documents are answered in one of them only; {_remedy()}"
            )
        changed = [doc for doc in first if _content(first[doc]) != _content(second[doc])]
        if changed:
            raise ComparisonError(
                f"{a.folder} and {b.folder} differ in field '{name}.data' of document {changed[0][1]}; {_remedy()}"
            )


def _check_prompts(a: Run, b: Run, one: Answers, other: Answers, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse other wordings of the same questions."""
    for method_a, method_b in pairs:
        first, second = _documents(one, method_a), _documents(other, method_b)
        for doc, sample in first.items():
            if sample["prompt"] != second[doc]["prompt"]:
                raise ComparisonError(
                    f"{a.folder} and {b.folder} differ in field '{one.task.name}.prompt' of document {doc[1]}: "
                    f"{sample['prompt']!r} and {second[doc]['prompt']!r}; ask both alike, or add --other-prompts if "
                    "the prompts are what you compare"
                )


def _remedy() -> str:
    return "run both on the same data, or compare what they have in common with --intersect"


def _task_entry(run: Run, name: str) -> dict[str, Any]:
    return dict(((run.results or {}).get("tasks") or {}).get(name) or {})


def _documents(answers: Answers, method: str) -> dict[tuple[str, str], Sample]:
    return {(split, doc): sample for split, docs in answers.by_method[method].items() for doc, sample in docs.items()}


def _content(sample: Sample) -> tuple[Any, ...]:
    """What makes two samples answers to the same question, except its wording."""
    return (sample["image_sha256"], sample.get("label"), sample.get("ground_truth"))


def _common(
    one: Answers, other: Answers, pairs: Sequence[tuple[str, str]], other_prompts: bool
) -> tuple[Answers, Answers, str]:
    """Both sides cut down to documents that are the same question about the same picture in every pair."""
    keep: set[tuple[str, str]] | None = None
    most = 0
    for method_a, method_b in pairs:
        first, second = _documents(one, method_a), _documents(other, method_b)
        same = {
            doc
            for doc in first.keys() & second.keys()
            if _content(first[doc]) == _content(second[doc])
            and (other_prompts or first[doc]["prompt"] == second[doc]["prompt"])
        }
        most = max(most, len(first.keys() | second.keys()))
        keep = same if keep is None else keep & same
    if not keep:
        raise ComparisonError(f"the runs have no document of {one.task.name} in common: run both on the same data")
    note = f"compared on the {len(keep)} common documents of {most}"
    return _cut(one, keep), _cut(other, keep), note


def _cut(answers: Answers, keep: set[tuple[str, str]]) -> Answers:
    kept = {
        method: {s: {d: sample for d, sample in docs.items() if (s, d) in keep} for s, docs in splits.items()}
        for method, splits in answers.by_method.items()
    }
    return Answers(answers.task, answers.flavour, answers.data_split, kept)


def _milder_differences(a: Run, b: Run, name: str) -> list[str]:
    """Warnings about prompts and decoding, which may be what is being compared."""
    warnings = []
    for key, label in (("prompts_sha256", "prompts"), ("generation", "generation arguments")):
        first, second = (_task_entry(run, name).get(key) for run in (a, b))
        if first != second:
            detail = f": {first} and {second}" if key == "generation" else ""
            warnings.append(f"{name}: {label} differ between {a.folder} and {b.folder}{detail}")
    seeds = [((run.results or {}).get("config") or {}).get("seed") for run in (a, b)]
    if seeds[0] != seeds[1]:
        warnings.append(f"{name}: seeds differ between {a.folder} and {b.folder}: {seeds[0]} and {seeds[1]}")
    return warnings


def _list(names: Any) -> str:
    return ", ".join(names) or "none"
