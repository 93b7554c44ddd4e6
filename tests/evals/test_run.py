"""Runs: what is written, resuming, errors, interruption. No model: a decoder that answers from a hash."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_eval
import pytest

from mmfix_evals import results as results_module
from mmfix_evals import samples, worker
from mmfix_evals.arms import Arm
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.results import clean_argv, clean_values
from mmfix_evals.run import Interrupted, TooManyErrors, run
from mmfix_evals.tasks import Document

pytestmark = pytest.mark.usefixtures("fake_tasks")

METHODS = ("greedy", "var", "vhr:alpha=3")
Start = Callable[..., dict[str, Any]]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        "fake", ("fake-pope", "fake-chair"), METHODS, tmp_path / "run", limit=5, batch_size=4, resamples=50
    )


def start(config: RunConfig, decoder: fake_eval.FakeDecoder | None = None) -> dict[str, Any]:
    return run(config, ["mmfix", "eval", "run"], Reporter(quiet=True), lambda _: decoder or fake_eval.FakeDecoder())


def lines(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.out / "samples.jsonl").read_text().splitlines()]


def numbers(results: dict[str, Any]) -> tuple[Any, Any]:
    return results["metrics"], results["comparisons"]


def test_every_result_stands_once_with_interval_and_n(config: RunConfig) -> None:
    results = start(config)
    assert results == json.loads((config.out / "results.json").read_text())
    keys = [(e["task"], e["split"], e["method"], e["metric"]) for e in results["metrics"]]
    assert len(keys) == len(set(keys)) == len(METHODS) * (3 * 6 + 2 + 8)
    assert {e["data_split"] for e in results["metrics"]} == {"test"}
    assert {e["split"] for e in results["metrics"]} == {"random", "popular", "adversarial", "macro", "test"}
    for entry in results["metrics"]:
        assert entry["ci_low"] <= entry["value"] <= entry["ci_high"]
    assert {e["n"] for e in results["metrics"]} == {10, 30, 5}
    assert all(e["n_images"] == 5 for e in results["metrics"])
    pairs = [(e["task"], e["split"], e["method"], e["metric"], e["baseline"]) for e in results["comparisons"]]
    assert len(pairs) == len(set(pairs)) == 2 * (3 * 6 + 2 + 8)
    tested = {e["metric"] for e in results["comparisons"] if "mcnemar" in e}
    assert tested == {"accuracy", "chair_s"}


def test_results_say_how_they_came_about(config: RunConfig) -> None:
    results = start(config)
    assert (results["schema_version"], results["status"]) == (1, "complete")
    assert {"python", "torch", "transformers", "mmfix"} <= results["versions"].keys()
    assert results["machine"].keys() == {"cpu", "cores", "threads", "system", "gpu"}
    entry = results["tasks"]["fake-pope"]
    assert entry["image_ids"] == [f"test_0_{i}.png" for i in range(5)]
    assert entry["image_ids"] == results["tasks"]["fake-chair"]["image_ids"]
    assert (entry["parser"], results["tasks"]["fake-chair"]["flavour"]) == ("official", "pattern")
    assert entry["generation"] == {"do_sample": False, "max_new_tokens": 10}
    assert {"documents_sha256", "images_sha256"} == entry["data"].keys()
    assert str(config.out.parent) not in json.dumps(results)
    sample = lines(config)[0]
    assert sample.keys() >= {
        "key",
        "task",
        "split",
        "doc_id",
        "image",
        "method",
        "prompt",
        "response",
        "label",
        "error",
    }
    assert sample["verdicts"].keys() == {"official", "opera", "vcd", "lmms", "vlmeval", "strict3way"}


def test_methods_take_turns_on_each_batch_after_one_warm_up_each(config: RunConfig) -> None:
    decoder = fake_eval.FakeDecoder()
    start(replace(config, tasks=("fake-chair",)), decoder)
    labels = [label for label, _ in decoder.calls]
    assert labels == ["greedy", "var", "vhr"] * 3
    assert [len(prompts) for _, prompts in decoder.calls] == [4] * 6 + [1] * 3


@pytest.mark.parametrize(("device", "asked"), [("cpu", 4), ("cuda:0", 9)])
def test_a_warm_up_is_a_whole_batch_only_where_kernels_are_made_for_its_size(
    device: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(worker, "warm_up", lambda decoder, plan, arm, documents: counts.append(len(documents)))
    plan: Any = SimpleNamespace(task=SimpleNamespace(name="task"))
    one = worker.Worker({"greedy": SimpleNamespace(model=SimpleNamespace(device=device))})
    one.warm_up(plan, [Arm("greedy", (), ())], [Document(str(n), "test", "a.png", "?", {}) for n in range(9)])
    assert counts == [asked]


def test_speed_and_fired_shares(config: RunConfig) -> None:
    results = start(replace(config, batch_size=3))
    speed = {(e["task"], e["split"], e["method"]): e for e in results["speed"]}
    assert speed["fake-chair", "test", "greedy"]["relative_speed"] == 1.0
    fired = speed["fake-chair", "test", "var"]["fired"]
    assert fired == {"var": {"fired": 6.0, "considered": 8.0, "share": 0.75}}
    assert speed["fake-chair", "test", "greedy"]["fired_share"] is None


@pytest.mark.parametrize("kept", [0, 1, 3, 17, 60])
def test_a_run_cut_short_anywhere_resumes_to_the_same_numbers(config: RunConfig, kept: int, tmp_path: Path) -> None:
    whole = start(replace(config, out=tmp_path / "whole"))
    start(config)
    path = config.out / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    (config.out / "results.json").unlink()
    decoder = fake_eval.FakeDecoder()
    assert numbers(start(config, decoder)) == numbers(whole)
    assert len(lines(config)) == len(lines(replace(config, out=tmp_path / "whole")))


def test_a_finished_run_asks_nothing_again(config: RunConfig) -> None:
    first = start(config)
    size = (config.out / "samples.jsonl").stat().st_size
    decoder = fake_eval.FakeDecoder()
    assert numbers(start(config, decoder)) == numbers(first)
    assert decoder.calls == []
    assert (config.out / "samples.jsonl").stat().st_size == size


def test_a_torn_last_line_is_dropped_with_a_warning(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    first = start(config)
    path = config.out / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert numbers(start(config)) == numbers(first)
    assert "dropped line 105, torn" in capsys.readouterr().err
    assert len(lines(config)) == 105


def test_a_line_torn_before_its_line_break_only(config: RunConfig) -> None:
    first = start(config)
    path = config.out / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert numbers(start(config)) == numbers(first)


def test_a_bad_line_in_the_middle_is_named(config: RunConfig) -> None:
    start(config)
    path = config.out / "samples.jsonl"
    content = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*content[:6], "{broken\n", *content[6:]]))
    with pytest.raises(DataError, match=r"samples.jsonl, line 7: not a sample"):
        start(config)


def test_anything_in_the_key_makes_a_new_sample(config: RunConfig) -> None:
    start(config)
    for changed in (
        {"seed": 1},
        {"max_new_tokens": 7},
        {"gen_kwargs": {"num_beams": 2}},
        {"world_seed": 3},
        {"split": "dev"},
        {"methods": ("greedy", "var:move=0.5", "vhr:alpha=2.5")},
    ):
        decoder = fake_eval.FakeDecoder()
        start(replace(config, **changed), decoder)
        assert decoder.calls, changed


@pytest.mark.parametrize("old", [{"seed": 7}, {"max_new_tokens": 3}, {"split": "dev"}, {"world_seed": 1}])
def test_old_samples_are_ignored_with_a_warning(
    config: RunConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path, old: dict[str, Any]
) -> None:
    start(config)
    start(replace(config, **old))
    results = start(config)  # its own samples are not the newest ones in the file
    assert "105 samples" in capsys.readouterr().err
    assert numbers(results) == numbers(start(replace(config, out=tmp_path / "fresh")))
    assert {e["n"] for e in results["metrics"]} == {10, 30, 5}


def test_another_limit_reuses_answers_about_the_same_pictures(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, tasks=("fake-chair",))
    start(config)
    decoder = fake_eval.FakeDecoder()
    results = start(replace(config, limit=9), decoder)
    fresh = start(replace(config, limit=9, out=tmp_path / "fresh"))
    assert numbers(results) == numbers(fresh)
    asked = [len(prompts) for label, prompts in decoder.calls if label == "var"]
    assert asked == [4, 4, 1]  # the warm-up, then the batches with something missing


def fail_at(label: str, word: str, error: BaseException) -> Callable[[str, Sequence[str]], None]:
    def before(asked: str, prompts: Sequence[str]) -> None:
        if asked == label and any(word in prompt for prompt in prompts):
            raise error

    return before


def test_the_first_error_stops_and_keeps_what_was_done(config: RunConfig) -> None:
    decoder = fake_eval.FakeDecoder(before=fail_at("var", "book", RuntimeError("no\nluck")))
    with pytest.raises(TooManyErrors, match=r"fake-pope random/\d+ \(var\): RuntimeError: no luck"):
        start(config, decoder)
    results = json.loads((config.out / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert next(line for line in lines(config) if line["error"])["response"] is None
    assert any(line["error"] is None and line["method"] == "var" for line in lines(config))
    start(config)  # asked again, and now answered


def test_errors_are_isolated_counted_and_never_scored(config: RunConfig) -> None:
    config = replace(config, tasks=("fake-pope",), max_errors=100)
    decoder = fake_eval.FakeDecoder(before=fail_at("var", "book", RuntimeError("no")))
    results = start(config, decoder)
    assert results["status"] == "complete"
    n = {(e["split"], e["method"]): e["n"] for e in results["metrics"] if e["metric"] == "accuracy"}
    failed = [e for e in results["errors"] if e["split"] == "random"]
    assert n["random", "var"] == 10 - len(failed) < n["random", "greedy"] == 10
    assert all("RuntimeError: no" in e["error"] for e in results["errors"])
    compared = {e["method"]: e["n"] for e in results["comparisons"] if (e["split"], e["metric"]) == ("random", "f1")}
    assert compared["var"] == n["random", "var"]
    clean = start(replace(config, max_errors=0))
    assert not clean["errors"]
    assert {e["n"] for e in clean["metrics"]} == {10, 30}


def test_a_refused_method_is_not_an_error_of_a_document(config: RunConfig) -> None:
    from mmfix.errors import UnsupportedModel

    decoder = fake_eval.FakeDecoder(before=fail_at("var", "Is", UnsupportedModel("no image token")))
    with pytest.raises(UnsupportedModel):
        start(replace(config, max_errors=100), decoder)
    assert not any(line["error"] for line in lines(config))


def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(config: RunConfig, tmp_path: Path) -> None:
    calls = 0

    def before(label: str, prompts: Sequence[str]) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="Run the same command again to resume"):
        start(config, fake_eval.FakeDecoder(before=before))
    results = json.loads((config.out / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert results["metrics"]
    assert len(lines(config)) == 20
    assert numbers(start(config)) == numbers(start(replace(config, out=tmp_path / "whole")))


def test_a_full_disk_keeps_whole_lines(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = samples.SampleLog._write
    written = 0

    def write(self: samples.SampleLog, line: bytes) -> None:
        nonlocal written
        written += 1
        if written == 11:
            original(self, line[:30])
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, line)

    monkeypatch.setattr(samples.SampleLog, "_write", write)
    with pytest.raises(OSError, match="No space left on device; finished samples are kept") as caught:
        start(config)
    assert caught.value.filename == str(config.out / "samples.jsonl")
    assert len(lines(config)) == 10
    monkeypatch.undo()


def test_results_are_replaced_only_when_complete(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = start(config)

    def broken(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="No space"):
        results_module.write(config.out, {**before, "status": "other"})
    assert json.loads((config.out / "results.json").read_text()) == before
    assert sorted(path.name for path in config.out.iterdir()) == ["reports.json", "results.json", "samples.jsonl"]


def test_two_runs_cannot_write_one_folder(config: RunConfig) -> None:
    start(config)
    with samples.SampleLog(config.out), pytest.raises(DataError, match="another run is writing here"):
        start(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("fake-popes",)}, "unknown task 'fake-popes': did you mean fake-pope"),
        ({"split": "tset"}, "unknown split 'tset': did you mean test"),
        ({"limit": 0}, "--limit 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"world_seed": -1}, "--world-seed -1"),
        ({"parser": "officail"}, "unknown parser 'officail': did you mean official"),
        ({"methods": ("greedy+var",)}, "greedy is the absence of methods"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(
    config: RunConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("+", r"\+")):
        start(replace(config, **change))
    assert not config.out.exists()


def test_secrets_do_not_reach_the_results() -> None:
    argv = ["mmfix", "eval", "run", "--max-new-tokens", "7", "--hf-token", "abc", "--token=xyz", "hf_abcDEF123"]
    argv += ["--gen-kwargs", "top_p=0.9,api_key=q1,max_new_tokens=3", "--methods", "var:move=0.4,tau=4,vhr"]
    cleaned = clean_argv(argv)
    assert cleaned[3:9] == ["--max-new-tokens", "7", "--hf-token", "***", "--token=***", "***"]
    assert cleaned[9:] == [
        "--gen-kwargs",
        "top_p=0.9,api_key=***,max_new_tokens=3",
        "--methods",
        "var:move=0.4,tau=4,vhr",
    ]
    assert clean_values({"token": "abc", "top_p": 0.5}) == {"token": "***", "top_p": 0.5}


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (("greedy", "causalmm"), True),
        (("greedy", "causalmm+var"), True),
        (("greedy", "causalmm", "plausibility"), False),
        (("greedy", "plausibility"), False),
        (("greedy", "var", "vhr"), False),
    ],
)
def test_a_contrast_method_without_its_control_is_remarked_on(
    config: RunConfig, capsys: pytest.CaptureFixture[str], methods: tuple[str, ...], said: bool
) -> None:
    config = replace(config, tasks=("fake-chair",), methods=methods, limit=1)
    run(config, ["mmfix"], Reporter(), lambda _: fake_eval.FakeDecoder())
    assert ("add plausibility to --methods as the control" in capsys.readouterr().err) is said
