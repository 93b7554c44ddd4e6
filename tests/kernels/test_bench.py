"""Benchmarks: what a record holds, what is refused, tables and pictures; the committed compile table is current."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import subprocess
import xml.dom.minidom
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmfix_evals.bench import decode, model, plot, table
from mmfix_evals.cli.app import app
from mmfix_evals.errors import DataError, UsageError
from mmfix_kernels import attention
from mmfix_kernels.bench import measure, record
from mmfix_kernels.bench.cases import EDITS, Case
from mmfix_kernels.triton.compile_report import DEFAULTS, TARGETS, variants

ROOT = Path(__file__).resolve().parents[2]
TINY = [Case(phase, "var", 64, heads=2, kv_heads=2, width=16, dtype="float32") for phase in ("decode", "prefill")]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cases", lambda device, quick: TINY)
    monkeypatch.setattr(measure, "ceilings", lambda device: measure.Ceilings(1e9, 1e9))


def test_a_record_says_what_where_and_with_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = measure.measure_kernels(tmp_path, "cpu", budget=0.0, tests_passed=True)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["case"] for r in records[:1]] == [TINY[0].name]
    assert {r["backend"] for r in records} == {
        "sdpa-default",
        "sdpa-bias",
        "eager-with-maps",
        "mmfix-triton",
        "mmfix-sdpa",
    }
    assert "only the ratios" in capsys.readouterr().out
    for one in records:
        assert {
            "bytes",
            "flops",
            "device",
            "driver",
            "torch",
            "triton",
            "transformers",
            "git",
            "dirty",
            "seed",
            "utc",
        } <= set(one)
        assert one["checked"] == "tests/kernels, by the caller"
        if one["backend"] == "mmfix-triton":
            assert one["unmeasured"] == "no CUDA device"
            continue
        assert 0 < one["p20"] <= one["p50"] <= one["p80"]
        assert one["ratio_to_floor"] == pytest.approx(one["p50"] / max(one["bytes"], one["flops"]) * 1e9)
    first = next(r for r in records if r["backend"] == "sdpa-default")
    assert first["ratio_to_sdpa"] == 1.0
    assert not re.search(r"/(home|root|work|tmp)/", path.read_text())


def test_bytes_and_flops_by_hand() -> None:
    case = Case("decode", "none", 100, heads=4, kv_heads=2, width=8, dtype="float32")
    assert case.bytes() == (2 * 4 + 2 * 2 * 100) * 8 * 4 + 100
    assert case.flops() == 4 * 4 * 100 * 8
    shared = replace(case, branches=3)
    assert shared.bytes() == (3 * 2 * 4 + 2 * 2 * (3 * 32 + 68)) * 8 * 4 + 3 * 32 + 68
    call = shared.call(CPU, 0)
    assert call.keys == 100
    assert call.prefix_key is not None
    assert call.prefix_key.shape[0] * 3 == call.query.shape[0]


def test_every_edit_is_a_call_that_backends_serve_alike() -> None:
    for edit, phase, branches in itertools.product(EDITS, ("prefill", "decode"), (1, 2)):
        if phase == "decode" or branches == 1:
            case = Case(phase, edit, 80, heads=2, kv_heads=1, width=16, dtype="float32", branches=branches)
            assert record.agrees(case.call(CPU, 0), "sdpa")


def test_nothing_is_reported_while_tests_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def red(command: Any, **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "1 failed", "")

    with monkeypatch.context() as patch:
        patch.setattr(record.subprocess, "run", red)
        with pytest.raises(record.RedTests, match="1 failed"):
            measure.measure_kernels(tmp_path, "cpu", budget=0.0)
        done = CliRunner().invoke(app, ["bench", "kernels", "--device", "cpu", "--out", str(tmp_path)])
        assert done.exit_code != 0
        assert "red" in str(done.exception)
    assert not (tmp_path / "kernels.jsonl").exists()


def test_a_backend_with_another_answer_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = attention.BACKENDS["sdpa"]

    def wrong(call: Any) -> Any:
        attended = true.attend(call)
        return replace(attended, output=attended.output * 1.01)

    monkeypatch.setitem(attention.BACKENDS, "sdpa", true._replace(attend=wrong))
    with pytest.raises(record.RedTests, match="'mmfix-sdpa' differs"):
        measure.measure_kernels(tmp_path, "cpu", budget=0.0, tests_passed=True)
    records = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    timed = {one["backend"] for one in records if "p50" in one}
    assert timed == {"sdpa-default", "sdpa-bias", "eager-with-maps"}, "the others of every case are timed all the same"
    assert {one["case"] for one in records} == {case.name for case in TINY}
    with pytest.raises(record.RedTests, match="'sdpa' differs"):
        record.self_check(CPU)


def test_no_case_is_begun_after_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = measure.measure_kernels(tmp_path, "cpu", budget=0.0, tests_passed=True, limit=-1.0)
    assert not path.exists()
    assert f"not measured, -1 s have passed: {TINY[0].name}" in capsys.readouterr().out
    path = measure.measure_kernels(tmp_path, "cpu", budget=0.0, tests_passed=True, only="prefill")
    assert {json.loads(line)["case"] for line in path.read_text().splitlines()} == {TINY[1].name}


@pytest.mark.parametrize(
    ("name", "measure_name"),
    [("mmfix_kernels.bench.__main__", "measure_kernels"), ("mmfix_evals.bench.decode", "measure_decode")],
)
def test_as_a_module_red_tests_are_an_exit_code(
    name: str,
    measure_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = importlib.import_module(name)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, measure_name, lambda *given, **named: calls.append((*given, *named.values())))
    words = ["--out", str(tmp_path), "--device", "cpu"]
    assert module.main([*words, "--tests-passed"]) == module.main(words) == 0
    assert [(call[:2], call[-1]) for call in calls] == [((tmp_path, "cpu"), True), ((tmp_path, "cpu"), False)]

    def red(*given: Any, **named: Any) -> None:
        raise record.RedTests("1 failed: nothing is reported")

    monkeypatch.setattr(module, measure_name, red)
    assert module.main(words) == 1
    assert capsys.readouterr().err == "1 failed: nothing is reported\n"


def test_an_installed_copy_checks_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.require_green(CPU) == "self-check"
    assert record.revision() == (None, None)
    monkeypatch.setenv("MMFIX_REVISION", "abc")
    assert record.revision() == ("abc", None)


def fake_arms(times: dict[str, tuple[float, float]], clock: list[float]) -> list[model.Arm]:
    """Arms that take (seconds for the first token, seconds per further token)."""

    def arm(name: str, first: float, step: float) -> model.Arm:
        def run(inputs: Any, tokens: int) -> None:
            if first < 0:
                raise RuntimeError("cannot run")
            clock[0] += first + step * (tokens - 1)

        return model.Arm(name, "", nullcontext, run)

    return [arm(name, *pair) for name, pair in times.items()]


def test_decode_speed_is_the_difference_of_two_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(decode.time, "perf_counter", lambda: clock[0])
    arms = fake_arms({"vanilla": (2.0, 0.1), "slow": (3.0, 0.2), "broken": (-1.0, 0.0), "odd": (1.0, -0.1)}, clock)
    inputs = {"input_ids": torch.zeros(2, 5)}
    plain, slow, broken, odd = decode.rounds(arms, inputs, 11, 3)
    assert plain["decode_speed"] == pytest.approx(1.0)
    assert slow["decode_speed"] == pytest.approx(0.5)
    assert slow["prefill_time"] == pytest.approx(1.5)
    assert slow["tokens_per_s"] == pytest.approx(2 / 0.2)
    assert broken["unmeasured"] == "RuntimeError: cannot run"
    assert "too busy" in odd["unmeasured"]
    assert [one["runs"] for one in decode.rounds(arms[:2], inputs, 11, 3, until=0.0)] == [1, 1]


@pytest.mark.slow
def test_arms_generate_what_they_say(tmp_path: Path) -> None:
    """A small LLaVA: the machinery alone gives plain greedy's tokens, as does eager; records and table follow."""
    shape = model.Shape(layers=3, width=64, vision_layers=1, vision_width=64)
    built = model.build(CPU, shape)
    inputs = model.prompt(built, 620, 1, seed=0)
    assert int((inputs["input_ids"] == model.IMAGE_ID).sum()) == model.IMAGE_TOKENS
    answers = {}
    for name in ("vanilla", "empty", "static/empty", "eager-maps", "sequential", model.OPEN_VAR + "@sdpa"):
        arm = model.arm(built, name)
        with torch.inference_mode(), arm.enter():
            answers[name] = arm.run(inputs, 3)
    tokens = answers["vanilla"][:, -3:]  # type: ignore[index]
    assert torch.equal(answers["empty"][:, -3:], tokens)  # type: ignore[index]
    assert torch.equal(answers["static/empty"][:, -3:], tokens)  # type: ignore[index]
    assert torch.equal(answers["eager-maps"].sequences[:, -3:], tokens)  # type: ignore[attr-defined]
    assert answers["sequential"].shape == (1, 3)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="static/"):
        model.arm(built, "static/sequential")
    decode.measure_decode(
        tmp_path, arms="empty,static/vanilla", tokens=3, runs=1, shape=shape, lengths=[620], tests_passed=True
    )
    shown = table.speed_table(tmp_path)
    for name in ("empty", "static/vanilla"):
        assert f"| 3 layers, width 64, float32, 620 tokens, batch 1 | `{name}` |" in shown
    assert table.UNMEASURED in shown


RECORD = {
    "case": "decode var", "backend": "sdpa-default", "p50": 1.0, "ratio_to_sdpa": 1.0, "floor": 1e-6, "torch": "2",
    "device": "Some CPU", "device_type": "cpu", "threads": 1,
}  # fmt: skip


def test_tables_say_where_and_that_no_gpu_was_measured(tmp_path: Path) -> None:
    assert table.speed_table(tmp_path) == table.UNMEASURED
    path = tmp_path / "kernels.jsonl"
    old = {**RECORD, "backend": "mmfix-sdpa", "ratio_to_sdpa": 9.0}
    for one in (old, RECORD, {**old, "ratio_to_sdpa": 2.5}):
        record.append(path, one)
    shown = table.speed_table(tmp_path)
    assert "| decode var | 2.50 | 1.00 | 1.0 µs |" in shown, "the newest record counts"
    assert "Some CPU, 1 thread, torch 2" in shown
    assert "Not yet measured on a GPU" in shown
    record.append(path, {**RECORD, "device": "Some GPU", "device_type": "cuda"})
    shown = table.speed_table(tmp_path)
    assert "Some GPU, torch 2" in shown
    assert "Not yet" not in shown


def test_growth_of_memory_is_a_parabola_through_the_lengths(tmp_path: Path) -> None:
    for length in (640, 2048, 8192):
        for name, square in (("vanilla", 0), ("eager-maps", 3)):
            record.append(
                tmp_path / "decode.jsonl",
                {**RECORD, "case": f"big, {length} tokens, batch 1", "arm": name, "length": length, "unmeasured": "-",
                 "peak_bytes": square * length**2 + 2048 * length + 7},
            )  # fmt: skip
    shown = table.speed_table(tmp_path)
    assert "| big, batch 1 | `vanilla` | 640, 2048, 8192 | 2.0 | 0.00 |" in shown
    assert "| big, batch 1 | `eager-maps` | 640, 2048, 8192 | 2.0 | 3.00 |" in shown
    case = Case("prefill", "var", 640)
    assert case.name.replace("s640 ", "") in table.memory_table(
        [{**RECORD, "case": replace(case, keys=n).name, "keys": n, "peak_bytes": n} for n in (640, 2048, 4096)]
    )


def test_pictures_are_drawn_from_records(tmp_path: Path) -> None:
    path = tmp_path / "kernels.jsonl"
    with pytest.raises(DataError, match="no measurement"):
        plot.write_plots([path], tmp_path)
    for value in (1.0, 2.0):
        record.append(path, {**RECORD, "backend": f"b{value}", "ratio_to_sdpa": value, "case": "a < b"})
    (picture,) = plot.write_plots([path], tmp_path)
    found = xml.dom.minidom.parse(str(picture))
    widths = [
        float(r.getAttribute("width")) for r in found.getElementsByTagName("rect") if r.getAttribute("height") == "11"
    ]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)
    assert "a &lt; b" in picture.read_text()


def test_the_command_has_all_parts() -> None:
    for name in ("kernels", "decode", "table", "plot"):
        shown = CliRunner().invoke(app, ["bench", name, "--help"])
        assert shown.exit_code == 0
        assert f"Example: mmfix bench {name}" in re.sub(r"\s+", " ", shown.output)


def test_the_committed_compile_table_is_that_of_the_variants() -> None:
    """All variants stand in it for all targets; CUDA targets compile, and no default at 128 spills."""
    rows = [
        [cell.strip() for cell in line.strip("| \n").split(" | ")]
        for line in (ROOT / "kernels/benchmarks/results/compile.md").read_text().splitlines()
        if line.startswith("| ") and "---" not in line and not line.startswith("| variant")
    ]
    known = {(variant.name, target) for variant in variants("all") for target in TARGETS}
    found = {(row[0], row[2]) for row in rows}
    assert found == known
    for row in rows:
        assert "did not compile" not in row[3] or row[2] == "gfx942", row
        if row[0].endswith(DEFAULTS) and row[2] != "gfx942":
            assert row[4] == "0", f"{row[0]} spills on {row[2]}"
