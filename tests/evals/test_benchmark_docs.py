"""docs/benchmarks.md speaks of commands, tasks and options that exist, and leaves none of the tasks out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from mmfix_evals import tasks
from mmfix_evals.cli.app import app
from mmfix_evals.metrics import chair, mme, pope

TEXT = (Path(__file__).resolve().parents[2] / "docs/benchmarks.md").read_text()
COMMANDS = re.findall(r"^\$ mmfix (.+)$", TEXT.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_their_options_exist(line: str) -> None:
    command = typer.main.get_command(app)
    words = shlex.split(line)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    options = {name for parameter in command.params for name in parameter.opts}
    for word in words:
        assert not word.startswith("--") or word in options, f"{word} is no option of {command.name}"
    assert len(COMMANDS) > 10


def test_every_task_is_described() -> None:
    for task in tasks.tasks():
        assert f"`{task.name}`" in TEXT
    for spec in re.findall(r"--tasks (\S+)", TEXT):
        assert all(tasks.get(name) for name in spec.split(","))


def test_every_variant_and_option_value_is_named() -> None:
    named = [*pope.PARSERS, *chair.FLAVOURS, *mme.VARIANTS]
    for task in tasks.tasks():
        for option, values in task.options.items():
            named += [option, *(values or ())]
    for name in named:
        assert f"`{name}`" in TEXT, name
