"""Joining shards: their samples into one file, their scores computed anew. No model, no pictures, no torch.

A shard's ``results.json`` records how many answers it owed and a hash of their keys. From that alone it follows that a
shard is complete, that no answer is there twice, and that the shards together are the whole list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfix_evals import files, results, samples, tasks
from mmfix_evals.arms import BASELINE
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.samples import Sample, digest
from mmfix_evals.scoring import Answers, Settings
from mmfix_evals.shards import Shard, shard_folders

Results = dict[str, Any]
SAME = ("config", "bootstrap", "model", "methods", "tasks", "versions", "git")
MAY_DIFFER = {"config": ("device", "max_errors"), "model": ("device",), "git": ("dirty",)}


@dataclass(frozen=True)
class Part:
    """One complete shard: its folder, results, and its samples by key."""

    folder: Path
    results: Results
    shard: Shard
    by_key: dict[str, Sample]


def merge(folders: Sequence[Path], out: Path) -> Results:
    """Join complete shards into a run folder like that of an unsharded run, and return its results.

    Args:
        folders: shard folders, or the folder that all of them stand in.
        out: where ``samples.jsonl`` and ``results.json`` go; may be the folder that the shards stand in. Doing it
            again gives the same files.

    Raises:
        DataError: a shard is missing, incomplete, there twice, or of another run; names the folder.
        UsageError: ``out`` is a shard, or holds samples that are not of these shards.
    """
    paths = [path for folder in folders for path in _expand(folder)]
    if any(out.resolve() == path.resolve() for path in paths):
        raise UsageError(f"{out} is one of the shards: choose another --out")
    parts = sorted((_read(path) for path in paths), key=lambda part: part.shard.index)
    _check_numbers(parts)
    for other in parts[1:]:
        _check_same(parts[0], other)
    joined = _join(parts)
    _check_total(parts[0], joined)
    _check_out(out, joined)
    found = _score(parts, joined)
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in joined.values())
    files.write_text_atomic(out / samples.NAME, "".join(lines))
    results.write(out, found)
    return found


def _expand(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give the folders of `mmfix eval run --shard i/n`")
    return shard_folders(folder)


def _read(folder: Path) -> Part:
    """One shard, checked to hold exactly the answers it owed."""
    found = results.read(folder)
    recorded = found.get("shard")
    if not isinstance(recorded, dict):
        raise DataError(f"{folder}: not a shard, but a whole run; there is nothing to merge")
    try:
        shard = Shard(int(recorded["index"]), int(recorded["count"]))
        owed = {name: (int(entry["n"]), str(entry["keys_sha256"])) for name, entry in recorded["tasks"].items()}
        protocols = {name: str(entry["protocol"]) for name, entry in found["tasks"].items()}
        status = str(found["status"])
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as problem:
        raise DataError(f"{folder / results.NAME}: damaged ({problem!r}); run this shard again") from None
    remedy = f"run the same command with --shard {shard} again to finish it"
    if status != "complete":
        raise DataError(f"{folder}: this shard is not complete (status {status}); {remedy}")
    path = folder / samples.NAME
    if not path.is_file():
        raise DataError(f"{path}: missing; {remedy}")
    listed, _, warning = samples.read(path)
    if warning:
        raise DataError(f"{warning}; {remedy}")
    by_key = {}
    methods = {arm["name"] for arm in found["methods"]}
    for name, (count, keys_sha256) in owed.items():
        mine = {
            sample["key"]: sample
            for sample in listed
            if (sample.get("task"), sample.get("protocol")) == (name, protocols.get(name))
            and sample.get("method") in methods
        }
        if digest(sorted(mine)) != keys_sha256:
            raise DataError(f"{folder}: this shard is not complete ({name}: {len(mine)} of {count} answers); {remedy}")
        by_key.update(mine)
    return Part(folder, found, shard, by_key)


def _check_numbers(parts: Sequence[Part]) -> None:
    """Every number from 0 to n - 1 once."""
    first = parts[0]
    seen: dict[int, Part] = {}
    for part in parts:
        if part.shard.count != first.shard.count:
            raise DataError(
                f"{first.folder} is one of {first.shard.count} shards and {part.folder} one of {part.shard.count}; "
                "give the shards of one run"
            )
        if part.shard.index in seen:
            other = seen[part.shard.index].folder
            raise DataError(f"{other} and {part.folder} are both shard {part.shard}; give each shard once")
        seen[part.shard.index] = part
    absent = [i for i in range(first.shard.count) if i not in seen]
    if absent:
        names = ", ".join(f"{i}/{first.shard.count}" for i in absent)
        raise DataError(f"missing: shard {names}; run the same command with --shard {absent[0]}/{first.shard.count}")


def _check_same(one: Part, other: Part) -> None:
    """Refuse shards of different runs, naming the first field that differs."""
    for field in SAME:
        place = _difference(one.results.get(field), other.results.get(field), field, MAY_DIFFER.get(field, ()))
        if place:
            raise DataError(
                f"{one.folder} and {other.folder} differ in field '{place}'; they are not shards of one run. Run the "
                f"one that is wrong again"
            )


def _difference(a: Any, b: Any, place: str, without: Sequence[str] = ()) -> str:
    """The path of the first difference of two JSON values; empty where there is none."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            if name not in without:
                found = _difference(a.get(name), b.get(name), f"{place}.{name}")
                if found:
                    return found
        return ""
    return "" if a == b else place


def _join(parts: Sequence[Part]) -> dict[str, Sample]:
    joined: dict[str, Sample] = {}
    owner: dict[str, Part] = {}
    for part in parts:
        for key, sample in part.by_key.items():
            if key in joined:
                raise DataError(
                    f"{owner[key].folder} and {part.folder} both hold {sample['task']} {sample['doc_id']} "
                    f"({sample['method']}); they were cut with different options. Run both again"
                )
            joined[key] = sample
            owner[key] = part
    return joined


def _check_total(first: Part, joined: dict[str, Sample]) -> None:
    """As many answers as the whole list has; with disjoint complete shards that is every one of them."""
    arms = len(first.results["methods"])
    for name, entry in first.results["tasks"].items():
        found = sum(sample["task"] == name for sample in joined.values())
        if found != entry["n_documents"] * arms:
            raise DataError(
                f"{name}: the shards hold {found} answers, but the run has {entry['n_documents']} documents and {arms} "
                "methods; run the shards again with one set of options"
            )


def _check_out(out: Path, joined: dict[str, Sample]) -> None:
    path = out / samples.NAME
    if path.is_file():
        strange = {sample["key"] for sample in samples.read(path)[0]} - joined.keys()
        if strange:
            raise UsageError(f"{path} holds {len(strange)} samples that are not of these shards: choose another --out")


def _score(parts: Sequence[Part], joined: dict[str, Sample]) -> Results:
    """What an unsharded run would have written, with the times of all shards."""
    head = parts[0].results
    names = [arm["name"] for arm in head["methods"]]
    settings = Settings(**head["bootstrap"])
    scores = []
    for name, entry in head["tasks"].items():
        task = tasks.get(name)
        mine = [sample for sample in joined.values() if sample["task"] == name]
        answers = Answers.collect(task, task.flavour(entry.get(task.flavour_field)), mine, names)
        scores.append(results.score(answers, settings, BASELINE))
    computed = {**results.merge(scores), "errors": results.errors(joined.values(), head)}
    found = {name: computed.get(name, value) for name, value in head.items() if name != "shard"}
    found["argv"] = _without_shard(head["argv"])
    found["config"] = {
        **head["config"],
        "max_errors": max(part.results["config"]["max_errors"] for part in parts),
    }
    found["timing"] = _timing(parts)
    return found


def _without_shard(argv: Sequence[str]) -> list[str]:
    words, skip = [], False
    for word in argv:
        if not skip and word != "--shard" and not word.startswith("--shard="):
            words.append(word)
        skip = word == "--shard"
    return words


def _timing(parts: Sequence[Part]) -> dict[str, Any]:
    timings = [part.results["timing"] for part in parts]
    return {
        "started": min(str(timing["started"]) for timing in timings),
        "finished": max(str(timing["finished"]) for timing in timings),
        "seconds": sum(timing["seconds"] for timing in timings),
        "shards": [{**timing, "machine": part.results["machine"]} for timing, part in zip(timings, parts, strict=True)],
    }
