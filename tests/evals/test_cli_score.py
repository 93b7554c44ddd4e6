"""Scoring files from the command line: right numbers, clear refusals, no torch, quickly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfix_evals.metrics import chair, pope

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def mmfix(*argv: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmfix_evals.cli", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, **options)  # type: ignore[call-overload,no-any-return]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    labels = ["yes", "no", "yes", "no"]
    rows = [{"question_id": i, "image": "a.jpg", "text": "Is there?", "label": x} for i, x in enumerate(labels, 1)]
    return write(tmp_path / "questions.jsonl", rows)  # type: ignore[arg-type]


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    texts = ["Yes.", "No", "I do not think so", "maybe"]
    return write(tmp_path / "answers.jsonl", [{"question_id": i, "text": t} for i, t in enumerate(texts, 1)])


def test_pope(questions: Path, answers: Path) -> None:
    done = mmfix("eval", "score", "pope", "--questions", questions, "--answers", answers, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found == json.loads(json.dumps(pope.score_files(questions, answers)))
    assert found["accuracy"] == 0.5
    plain = mmfix("eval", "score", "pope", "--questions", questions, "--answers", answers)
    assert "accuracy       0.500000" in plain.stdout
    assert "mmfix: warning: " in plain.stderr


def test_chair(tmp_path: Path) -> None:
    captions = write(tmp_path / "captions.jsonl", [{"image_id": 7, "caption": "A cat and a dog."}])
    truth = tmp_path / "truth.json"
    truth.write_text('{"7": ["cat"]}')
    done = mmfix("eval", "score", "chair", "--captions", captions, "--ground-truth", truth, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found == json.loads(json.dumps(chair.score_files(captions, truth)))
    assert (found["chair_s"], found["chair_i"]) == (1.0, 0.5)
    wrong = mmfix("eval", "score", "chair", "--captions", captions, "--ground-truth", truth, "--truncate", "half")
    assert wrong.returncode == 2
    assert "last-period" in wrong.stderr


def test_bad_files_are_named_with_their_line(questions: Path, answers: Path, tmp_path: Path) -> None:
    answers.write_text(answers.read_text() + "{torn\n")
    done = mmfix("eval", "score", "pope", "--questions", questions, "--answers", answers, "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mmfix: error: ")
    assert "answers.jsonl, line 5" in done.stderr
    assert "Traceback" not in done.stderr
    done = mmfix("eval", "score", "pope", "--questions", tmp_path / "none", "--answers", answers)
    assert done.returncode == 1
    assert "no such file" in done.stderr
    done = mmfix("eval", "score", "pope", "--questions", questions, "--answers", answers, "--parser", "oficial")
    assert done.returncode == 2
    assert "did you mean official" in done.stderr


LIGHT = """
import sys
from mmfix_evals.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "mmfix"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize("command", ["pope", "list", "--version", "--help"])
def test_light_commands_import_no_torch(command: str, questions: Path, answers: Path) -> None:
    words = {
        "pope": ["eval", "score", "pope", "--questions", questions, "--answers", answers, "--json"],
        "list": ["eval", "list"],
    }.get(command, [command])
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *map(str, words)], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    if command == "--version" and "{'mmfix'" in done.stderr:
        pytest.skip("mmfix is not installed here, its version comes from the package")
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m mmfix_evals.cli eval list --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.stdout, done.stderr) == ("[", "")


def test_wrong_use_in_a_process_of_its_own() -> None:
    done = mmfix("eval", "run", "--tasks", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mmfix: error: unknown task 'nothing'")
    assert len(done.stderr.splitlines()) == 1
