"""The examples of docs/serving.md, run against a server."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import PICTURE, PROMPT, serving

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from mmfix_decoding import Decoder

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()
DEFAULT = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.S | re.M)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_pretrained("tiny")


@pytest.fixture(scope="module")
def url(decoder: Decoder) -> Iterator[str]:
    """The server of the page's first command."""
    assert "--method vhr --allow greedy,var" in PAGE
    with serving(decoder, "vhr", ("greedy", "var")) as (_, url):
        yield url


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here")
def test_the_shell_examples_work(url: str, decoder: Decoder) -> None:
    ask, look = (
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.replace(DEFAULT, url)], cwd=ROOT, capture_output=True, text=True
        )
        for block in blocks("sh")
    )
    expected = decoder.with_method("vhr").generate(PICTURE, PROMPT, max_new_tokens=64).text
    assert json.loads(ask.stdout)["choices"][0]["message"]["content"] == expected, ask.stderr
    assert look.returncode == 0, look.stderr
    assert '"status":"ok"' in look.stdout
    assert 'mmfix_generated_tokens_total{method="vhr"}' in look.stdout
    assert '"tiny:var"' in look.stdout


def test_the_python_example_works(url: str, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = blocks("python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace(DEFAULT, url), "docs/serving.md", "exec"), {})
    expected = decoder.with_method("vhr").generate(PICTURE, PROMPT, max_new_tokens=64)
    lines = printed.getvalue().splitlines()
    assert lines[0] == lines[-1] == expected.text
    assert lines[1] == f"{len(expected.token_ids)} stop"
    assert lines[2].startswith("vhr {'vhr': {'fired': ")


def test_every_option_of_the_page_exists() -> None:
    from typer.main import get_command

    from mmfix_evals.cli.app import app

    known = {name for one in get_command(app).commands["serve"].params for name in one.opts}  # type: ignore[attr-defined]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", PAGE))
    others = {"--data", "--base-url", "--tasks", "--model_args", "--batch_size", "--model"}
    assert {name for name in named if "_" not in name} - others <= known
    assert {"--max-queue", "--api-key-env", "--allow-remote-images"} <= named
