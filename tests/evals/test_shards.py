"""Shards: how a list is dealt out, and that merged files are the unsharded run, or are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_eval
import pytest

from mmfix_evals import run as run_module
from mmfix_evals.cli import main
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.merge import merge
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.results import read, without_times
from mmfix_evals.run import TooManyErrors, run
from mmfix_evals.samples import Sample
from mmfix_evals.shards import Shard, cut
from mmfix_evals.tasks import base

pytestmark = pytest.mark.usefixtures("fake_tasks")

METHODS = ("greedy", "var", "vhr:alpha=3")
Change = Callable[[Path], None]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        "fake", ("fake-pope", "fake-chair"), METHODS, tmp_path / "parts", limit=5, batch_size=4, resamples=30
    )


def start(config: RunConfig, decoder: fake_eval.FakeDecoder | None = None) -> dict[str, Any]:
    argv = ["mmfix", "eval", "run"] + ([] if config.shard.is_whole else ["--shard", str(config.shard)])
    return run(config, argv, Reporter(quiet=True), lambda _: decoder or fake_eval.FakeDecoder())


def in_parts(config: RunConfig, count: int) -> list[Path]:
    for index in range(count):
        start(replace(config, shard=Shard(index, count)))
    return [config.out / f"shard-{index}-of-{count}" for index in range(count)]


def text(results: dict[str, Any]) -> str:
    return json.dumps(without_times(results))


def lines(folder: Path) -> list[Sample]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("size", [1, 4, 30])
def test_every_item_is_in_exactly_one_part(count: int, size: int) -> None:
    batches = cut(range(30), size)
    parts = [Shard(index, count).part(batches) for index in range(count)]
    assert sorted(item for part in parts for batch in part for item in batch) == list(range(30))


@pytest.mark.parametrize(
    ("option", "environment", "found"),
    [
        (None, {}, Shard()),
        ("1/4", {}, Shard(1, 4)),
        (" 0/1 ", {}, Shard()),
        (None, {"RANK": "3", "WORLD_SIZE": "8"}, Shard(3, 8)),
        ("1/4", {"RANK": "3", "WORLD_SIZE": "8"}, Shard(1, 4)),
        (None, {"RANK": "0", "WORLD_SIZE": "1"}, Shard()),
        (None, {"RANK": "2"}, Shard()),
    ],
)
def test_which_part_this_process_has(option: str | None, environment: dict[str, str], found: Shard) -> None:
    assert Shard.find(option, environment) == found


@pytest.mark.parametrize(
    ("option", "environment", "words"),
    [
        ("4/4", {}, "0/4, 1/4, 2/4, 3/4"),
        ("0/0", {}, "--shard 0/0"),
        ("-1/4", {}, "--shard '-1/4'"),
        ("1", {}, "--shard '1': give i/n"),
        (None, {"WORLD_SIZE": "8"}, "RANK=''"),
        (None, {"WORLD_SIZE": "8", "RANK": "8"}, "torchrun"),
        (None, {"WORLD_SIZE": "many", "RANK": "0"}, "WORLD_SIZE='many'"),
    ],
)
def test_a_part_that_is_none_is_refused(option: str | None, environment: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Shard.find(option, environment)


@pytest.mark.parametrize("count", [2, 3, 11])
def test_merged_shards_are_the_unsharded_run(config: RunConfig, tmp_path: Path, count: int) -> None:
    whole = start(replace(config, out=tmp_path / "whole"))
    parts = in_parts(config, count)
    merged = merge([config.out], config.out)
    assert text(merged) == text(whole)
    assert merged == json.loads((config.out / "results.json").read_text())
    ours, theirs = ({s["key"]: s["response"] for s in lines(f)} for f in (config.out, tmp_path / "whole"))
    assert ours == theirs
    assert len(lines(config.out)) == len(ours) == sum(len(lines(part)) for part in parts)
    before = [(config.out / name).read_bytes() for name in ("samples.jsonl", "results.json")]
    assert merge(list(reversed(parts)), config.out) == merged
    assert [(config.out / name).read_bytes() for name in ("samples.jsonl", "results.json")] == before


def test_the_merged_folder_is_a_run_folder(config: RunConfig) -> None:
    in_parts(config, 2)
    merged = merge([config.out], config.out)
    decoder = fake_eval.FakeDecoder()
    assert text(start(config, decoder)) == text(merged)
    assert decoder.calls == []


def test_shards_that_find_their_own_batch_size(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, batch_size="auto")
    whole = start(replace(config, out=tmp_path / "whole"))
    in_parts(config, 3)
    merged = merge([config.out], tmp_path / "merged")
    assert (merged["metrics"], merged["comparisons"]) == (whole["metrics"], whole["comparisons"])


def test_failed_documents_are_merged_as_failed(config: RunConfig, tmp_path: Path) -> None:
    def before(label: str, prompts: Any) -> None:
        if label == "var" and any("book" in prompt for prompt in prompts):
            raise RuntimeError("no")

    config = replace(config, max_errors=50)
    whole = start(replace(config, out=tmp_path / "whole"), fake_eval.FakeDecoder(before=before))
    for index in range(2):
        start(replace(config, shard=Shard(index, 2)), fake_eval.FakeDecoder(before=before))
    merged = merge([config.out], config.out)
    assert merged["errors"] == whole["errors"]
    assert text(merged) == text(whole)
    assert len(merged["errors"]) == 6


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three complete shards, to be copied."""
    out = tmp_path_factory.mktemp("three") / "parts"
    names = ("fake-pope", "fake-chair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_TASKS", {names[0]: fake_eval.FakePope(), names[1]: fake_eval.FakeChair()})
        in_parts(RunConfig("fake", names, ("greedy", "var"), out, limit=5, batch_size=4, resamples=9), 3)
    return out


def unfinished(parts: Path) -> None:
    path = parts / "shard-1-of-3" / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def interrupted(parts: Path) -> None:
    path = parts / "shard-2-of-3" / "results.json"
    path.write_text(path.read_text().replace('"complete"', '"interrupted"'))


def torn(parts: Path) -> None:
    path = parts / "shard-0-of-3" / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-9])


def swapped(parts: Path) -> None:
    """Answers to another shard's questions in the right number."""
    shutil.copy(parts / "shard-0-of-3" / "samples.jsonl", parts / "shard-1-of-3" / "samples.jsonl")


def edit(name: str, change: Callable[[dict[str, Any]], None]) -> Change:
    def apply(parts: Path) -> None:
        path = parts / name / "results.json"
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (unfinished, r"shard-1-of-3: this shard is not complete \(fake-chair: 1 of 2 answers\).*--shard 1/3 again"),
        (interrupted, r"shard-2-of-3: .*status interrupted.*--shard 2/3 again"),
        (torn, r"shard-0-of-3/samples.jsonl: dropped line \d+.*--shard 0/3"),
        (swapped, r"shard-1-of-3: this shard is not complete"),
        (lambda p: shutil.rmtree(p / "shard-1-of-3"), r"missing: shard 1/3; run the same command with --shard 1/3"),
        (
            lambda p: shutil.copytree(p / "shard-1-of-3", p / "shard-3-of-3"),
            r"are both shard 1/3; give each",
        ),
        (lambda p: (p / "shard-1-of-3" / "samples.jsonl").unlink(), r"samples.jsonl: missing; .*--shard 1/3"),
        (lambda p: (p / "shard-1-of-3" / "results.json").unlink(), r"shard-1-of-3/results.json: missing"),
        (edit("shard-1-of-3", lambda r: r["config"].update(seed=5)), r"differ in field 'config.seed'"),
        (edit("shard-1-of-3", lambda r: r["versions"].update(torch="1.0")), r"differ in field 'versions.torch'"),
        (edit("shard-2-of-3", lambda r: r["methods"].pop()), r"shard-2-of-3: this shard is not complete"),
        (edit("shard-2-of-3", lambda r: r["shard"].update(count=4)), r"one of 3 shards and .* one of 4"),
        (edit("shard-2-of-3", lambda r: r["shard"].pop("tasks")), r"results.json: damaged .KeyError.'tasks'"),
        (edit("shard-0-of-3", lambda r: r.pop("shard")), r"shard-0-of-3: not a shard, but a whole run"),
    ],
)
def test_what_is_not_the_whole_run_is_refused_by_name(three: Path, tmp_path: Path, damage: Change, words: str) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(three, parts)
    damage(parts)
    with pytest.raises(DataError, match=words):
        merge([parts], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_shards_cut_with_other_options_are_refused(config: RunConfig) -> None:
    start(replace(config, shard=Shard(0, 2)))
    start(replace(config, shard=Shard(1, 2), batch_size=3))
    with pytest.raises(DataError, match=r"shard-0-of-2 and .*shard-1-of-2 differ in field 'config.batch_size'"):
        merge([config.out], config.out)


def test_answers_that_two_shards_hold_are_refused(config: RunConfig) -> None:
    """Even where the files claim that all is well."""
    start(replace(config, shard=Shard(0, 2)))
    start(replace(config, shard=Shard(1, 2), batch_size=3))
    edit("shard-1-of-2", lambda r: r["config"].update(batch_size=4))(config.out)
    with pytest.raises(DataError, match=r"shard-0-of-2 and .*shard-1-of-2 both hold fake-pope random/"):
        merge([config.out], config.out)


def test_a_folder_in_use_is_not_overwritten(config: RunConfig, tmp_path: Path) -> None:
    in_parts(config, 2)
    start(replace(config, out=tmp_path / "other", seed=3))
    before = (tmp_path / "other" / "samples.jsonl").read_bytes()
    with pytest.raises(UsageError, match="samples that are not of these shards: choose another --out"):
        merge([config.out], tmp_path / "other")
    assert (tmp_path / "other" / "samples.jsonl").read_bytes() == before
    with pytest.raises(UsageError, match="is one of the shards"):
        merge([config.out], config.out / "shard-1-of-2")
    with pytest.raises(DataError, match="no such folder"):
        merge([tmp_path / "none"], tmp_path / "merged")


def test_a_shard_resumes_and_counts_its_own_documents_only(config: RunConfig) -> None:
    calls = 0

    def before(label: str, prompts: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= 8:
            raise RuntimeError("no")

    part = replace(config, shard=Shard(1, 2))
    with pytest.raises(TooManyErrors, match="shard-1-of-2"):
        start(part, fake_eval.FakeDecoder(before=before))
    results = start(part)
    assert results["status"] == "complete"
    # 8 batches of POPE and 2 of CHAIR; the second, fourth, … of each are this shard's.
    assert sum(results["shard"]["tasks"][name]["n"] for name in config.tasks) == len(METHODS) * (4 * 3 + 2 + 1)
    assert len({sample["doc_id"] for sample in lines(part.folder)}) == 15


def test_the_command_line_shards_and_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "load_decoder", lambda config: fake_eval.FakeDecoder())
    words = ["eval", "run", "--model", "fake", "--tasks", "fake-chair", "--limit", "6", "--resamples", "20"]
    words += ["--batch-size", "2", "--methods", "greedy,vhr", "--quiet"]
    out = tmp_path / "run"
    assert main([*words, "--shard", "0/2", "--out", str(out)]) == 0
    assert f"mmfix eval merge {out} --out {out}" in capsys.readouterr().out
    assert main(["eval", "merge", str(out), "--out", str(out)]) == 1
    assert "missing: shard 1/2" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*words, "--out", str(out)]) == 0
    assert main(words) == 2
    assert "a shard needs --out" in capsys.readouterr().err
    assert main(["eval", "merge", str(out), "--out", str(out)]) == 0
    assert "fake-chair / test (6 captions, 6 images)" in capsys.readouterr().out
    assert main(["eval", "compare", str(out)]) == 0


def test_a_folder_of_shards_says_how_it_becomes_a_run(tmp_path: Path) -> None:
    (tmp_path / "shard-0-of-2").mkdir()
    with pytest.raises(DataError, match=r"holds shards. Run `mmfix eval merge .* --out"):
        read(tmp_path)
