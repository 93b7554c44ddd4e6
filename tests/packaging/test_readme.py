"""What is generated is up to date, and what the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mmfix_decoding import Decoder
from mmfix_evals import readme
from mmfix_evals.tinyworld import card, render, scene
from mmfix_evals.tinyworld.recipe import RECIPES

ROOT = Path(__file__).resolve().parents[2]


def test_generated_parts_are_up_to_date() -> None:
    assert readme.main(["--check"]) == 0


def test_the_model_card_is_up_to_date() -> None:
    assert card.CARD.read_text() == card.card(RECIPES["small"])


@pytest.mark.usefixtures("registry")
def test_the_method_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "class BoostImage" in block]
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), names)
    decoder = Decoder.from_pretrained("tiny", method=names["BoostImage"](strength=1.0))
    answer = decoder.generate(render(scene("dev", 0)), "Is there a bed in the image?", max_new_tokens=4)
    assert answer.report is not None
    assert answer.report["fired"]["boost-image"]["fired"] > 0
