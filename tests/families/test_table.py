"""The committed table says what the code says; models that cannot be served are refused by name, with the fact."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from support.families import FAMILIES
from support.refused_models import REFUSED, got_ocr

import mmfix
from mmfix.errors import UnsupportedModel


@functools.cache
def _build(name: str) -> Any:
    return FAMILIES[name].build()


def _module() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("family_table", Path(__file__).with_name("table.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_tables_are_current() -> None:
    table = _module()
    counted = table.counts(_build)
    assert json.loads(table.COUNTS.read_text()) == counted, "run python -m families.table"
    assert table.PATH.read_text() == table.render(_build, counted), "run python -m families.table"


def test_only_what_cannot_be_is_refused() -> None:
    """No family loses a method unnoticed: two facts explain every refusal."""
    table = _module()
    refused = set()
    for name in FAMILIES:
        family = mmfix.describe(_build(name))
        refused |= {(name, method) for method in table.METHODS if table.cell(family, method, []) != "yes"}
    assert refused == {("paligemma", "mma"), ("mllama", "mma"), ("mllama", "var"), ("mllama", "vhr")}


@pytest.mark.parametrize("title", REFUSED)
def test_a_model_that_cannot_be_served_is_refused(title: str) -> None:
    model = REFUSED[title]()
    with pytest.raises(UnsupportedModel, match=type(model).__name__):
        mmfix.describe(model)


def test_a_tower_with_attention_of_its_own_refuses_only_what_edits_it() -> None:
    model = got_ocr()
    with pytest.raises(UnsupportedModel, match=r"GotOcr2VisionEncoder.*outside"), mmfix.mitigate(model, "causalmm"):
        pass
    with mmfix.mitigate(model, "causalmm-language"):
        pass
