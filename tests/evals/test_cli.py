"""The command line, in process: what is printed where, and exit codes."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import fake_eval
import pytest

from mmfix_evals import run as run_module

RUN = ["eval", "run", "--model", "fake", "--tasks", "fake-pope,fake-chair", "--limit", "3", "--resamples", "20"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_eval.register(monkeypatch, fake_eval.FakePope(), fake_eval.FakeChair())
    monkeypatch.setattr(run_module, "load_decoder", lambda config: fake_eval.FakeDecoder())


def refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    """One line on standard error, no traceback, nothing on standard output."""
    assert result[0] == code, result
    assert result[1] == ""
    lines = result[2].strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("mmfix: ")
    for word in words:
        assert word in lines[0]


def test_run_prints_the_table_the_folder_and_the_next_command(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "a"
    code, printed, errors = call(*RUN, "--methods", "greedy,var:move=0.4,tau=4,vhr", "--out", out)
    assert code == 0
    assert "fake-chair / test (3 captions, 3 images)" in printed
    assert "var:move=0.4,tau=4" in printed
    assert printed.endswith(f"Run folder: {out}\nNext: mmfix eval compare {out}\n")
    assert "fake-pope: 54 answers" in errors
    results = json.loads((out / "results.json").read_text())
    assert results["config"]["methods"] == ["greedy", "var:move=0.4,tau=4", "vhr"]
    assert call(*RUN, "--out", out, "--quiet")[2].strip().startswith("mmfix: warning: ")


def test_quiet_says_nothing_on_standard_error(call: Call, tmp_path: Path) -> None:
    code, printed, errors = call(*RUN, "--out", tmp_path / "a", "--quiet")
    assert (code, errors) == (0, "")
    assert printed


def test_the_default_folder_is_named_after_the_time(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*RUN, "--methods", "greedy")[0] == 0
    assert len(list(tmp_path.glob("runs/*/results.json"))) == 1


def test_score_compare_and_report_of_a_run(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "a"
    call(*RUN, "--methods", "greedy,vhr", "--out", out)
    results = json.loads((out / "results.json").read_text())
    code, printed, _ = call("eval", "score", out, "--json")
    assert code == 0
    assert json.loads(printed)["metrics"] == results["metrics"]
    code, printed, _ = call("eval", "score", "--json", out)
    assert json.loads(printed)["comparisons"] == results["comparisons"]
    assert "fake-chair / test" in call("eval", "score", out)[1]
    code, printed, _ = call("eval", "compare", out, "--json")
    assert json.loads(printed)["comparisons"] == results["comparisons"]
    code, printed, _ = call("eval", "compare", out)
    assert (code, "McNemar" in printed, printed.isascii()) == (0, True, True)
    assert call("eval", "report", out)[1].startswith("  metric")
    assert call("eval", "report", out, "--format", "md")[1].startswith("**fake-pope / random")
    assert json.loads(call("eval", "report", out, "--format", "json")[1]) == results


def test_comparing_what_differs_exits_2_and_names_the_field(call: Call, tmp_path: Path) -> None:
    call(*RUN, "--out", tmp_path / "a")
    call(*RUN, "--out", tmp_path / "b", "--world-seed", "4")
    result = call("eval", "compare", tmp_path / "a", tmp_path / "b")
    refused(result, 2, "differ in field 'fake-pope.data.documents_sha256'", "--intersect")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "fake-pop"], ["unknown task 'fake-pop'", "did you mean fake-pope", "tinyworld-chair"]),
        (["--methods", "vra"], ["unknown method 'vra'", "vhr"]),
        (["--methods", "var:mov=1"], ["no parameter 'mov'", "move"]),
        (["--methods", "greedy,greedy"], ["twice"]),
        (["--methods", ","], ["no method given"]),
        (["--split", "tests"], ["unknown split 'tests'", "dev, test"]),
        (["--limit", "0"], ["--limit 0", "1 or more"]),
        (["--limit", "many"], ["--limit", "integer", "mmfix eval run --help"]),
        (["--gen-kwargs", "beams"], ["--gen-kwargs", "'beams'"]),
        (["--no-such-option"], ["--no-such-option", "mmfix eval run --help"]),
    ],
)
def test_wrong_use_of_run_exits_2(call: Call, tmp_path: Path, words: list[str], told: list[str]) -> None:
    refused(call(*RUN, "--out", tmp_path / "a", "--quiet", *words), 2, *told)
    assert not (tmp_path / "a").exists()


def test_other_wrong_use_exits_2(call: Call, tmp_path: Path) -> None:
    refused(call("eval", "score", "pop"), 2, "unknown scorer 'pop'", "did you mean pope", "run folder")
    refused(call("eval", "score", "pope"), 2, "--questions", "mmfix eval score pope --help")
    refused(call("eval", "report", tmp_path, "--format", "pdf"), 2, "unknown format 'pdf'")
    refused(call("frobnicate"), 2, "frobnicate", "mmfix --help")
    refused(call("serve", "--port", "65536"), 2, "--port 65536", "from 1 to 65535")


def test_failed_work_exits_1(call: Call, tmp_path: Path) -> None:
    refused(call("eval", "compare", tmp_path / "none"), 1, "no such run folder", "mmfix eval run")
    refused(call("eval", "report", tmp_path), 1, "results.json: missing")
    (tmp_path / "results.json").write_text('{"schema_version": 99}')
    refused(call("eval", "report", tmp_path), 1, "schema version 99", "newer mmfix")
    (tmp_path / "results.json").write_text('{"schema_version": 0}')
    refused(call("eval", "report", tmp_path), 1, "schema version 0", "Run it again")
    (tmp_path / "results.json").unlink()
    (tmp_path / "samples.jsonl").write_text("")
    refused(call("eval", "report", tmp_path), 1, "has not ended", "same command again")
    (tmp_path / "file").write_text("")
    refused(call(*RUN, "--out", tmp_path / "file", "--quiet"), 1, str(tmp_path / "file"), "choose another path")


def test_a_full_disk_is_one_line(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfix_evals.samples import SampleLog

    def full(self: SampleLog, line: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SampleLog, "_write", full)
    result = call(*RUN, "--out", tmp_path / "a", "--quiet")
    refused(result, 1, "samples.jsonl: No space left on device; finished samples are kept", "same command again")


def test_ctrl_c_exits_130_and_says_how_to_resume(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(label: str, prompts: object) -> None:
        if label == "vhr":
            raise KeyboardInterrupt

    decoder = fake_eval.FakeDecoder(before=stop)
    monkeypatch.setattr(run_module, "load_decoder", lambda config: decoder)
    result = call(*RUN, "--methods", "greedy,vhr", "--out", tmp_path / "a", "--quiet")
    refused(result, 130, "mmfix: stopped: ", "finished samples are kept", "Run the same command again to resume")


def test_an_unexpected_error_is_one_line_without_debug(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: object) -> None:
        raise ValueError("a\nsurprise")

    monkeypatch.setattr(run_module, "load_decoder", broken)
    words = [*RUN, "--out", tmp_path / "a", "--quiet"]
    refused(call(*words), 1, "ValueError: a surprise. Run again with --debug")
    for debugged in (["--debug", *words], [*words, "--debug"]):
        code, _, errors = call(*debugged)
        assert code == 1
        assert "Traceback" in errors
        assert errors.splitlines()[-1].startswith("mmfix: error: ValueError")


def test_list_names_tasks_metrics_and_parsers(call: Call) -> None:
    code, printed, _ = call("eval", "list")
    assert code == 0
    assert "tinyworld-pope" in printed
    assert "parsers: official, opera" in printed
    listed = {entry["task"]: entry for entry in json.loads(call("eval", "list", "--json")[1])}
    assert listed["fake-chair"]["flavours"] == ["pattern"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["eval"],
        ["eval", "run"],
        ["eval", "score"],
        ["eval", "score", "pope"],
        ["eval", "score", "chair"],
        ["eval", "score", "run"],
        ["eval", "compare"],
        ["eval", "report"],
        ["eval", "list"],
        ["describe"],
        ["methods"],
        ["doctor"],
        ["calibrate"],
        ["calibrate", "sinks"],
        ["tune"],
        ["calibrate", "vti"],
    ],
)
def test_every_command_has_help_with_an_example(call: Call, words: list[str]) -> None:
    code, printed, errors = call(*words, "--help")
    assert (code, errors) == (0, "")
    assert "Example: mmfix" in " ".join(printed.split())


def test_version(call: Call) -> None:
    import mmfix

    assert call("--version") == (0, f"mmfix {mmfix.__version__}\n", "")
