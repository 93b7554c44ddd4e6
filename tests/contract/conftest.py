"""Tiny models shared by the contract tests, made once per session; each test sees them unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import steered, vlm
from support.cases import NAMES

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

CORE = ("causalmm", "causalmm-language", "causalmm-vision", "mma", "plausibility", "var", "vhr")
OTHERS = ("llava-next", "qwen2.5-vl", "gemma3", "idefics2")  # of test_other_families.py
TURNS = ("test_batching", "test_effect", "test_generate", "test_restore")
HERE = Path(__file__).parent
_BUILT: dict[str, Any] = {}


def _model(name: str) -> Any:
    if name not in _BUILT:
        _BUILT[name] = steered.calibrated(vlm.build(name))
    return _BUILT[name]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Methods outside the core run on one of the two LLaVAs, the one with grouped queries, and on the other families.

    There are many of them, and what the other one adds (as many key heads as query heads) is the simpler case. Of the
    other families each takes every second one, in turn, so that every method meets two and every family half of them;
    and of the variants of a test in TURNS each takes one, in turn.
    """
    here = [item for item in items if isinstance(item, pytest.Function) and item.path.parent == HERE]
    specs = [(item, getattr(item, "callspec", None)) for item in here]
    known = [(item, spec.params) for item, spec in specs if spec is not None]
    spared = {item for item, params in known if _simpler(params) or _other_turn(params)}
    variants: dict[tuple[str, str, str], list[pytest.Item]] = {}
    for item, params in known:
        name = _outside(params)
        if name and item not in spared and item.path.stem in TURNS:
            variants.setdefault((item.path.stem, item.originalname, name), []).append(item)
    for (_, _, name), alike in variants.items():
        spared |= {item for n, item in enumerate(alike) if n != NAMES.index(name) % len(alike)}
    config.hook.pytest_deselected(items=[item for item in items if item in spared])
    items[:] = [item for item in items if item not in spared]


def _simpler(params: dict[str, Any]) -> bool:
    return params.get("model") == "llava" and bool(_outside(params))


def _outside(params: dict[str, Any]) -> str:
    """The one method that a test is about, if it is outside the core; else ""."""
    chosen = params.get("name") or params.get("method") or params.get("methods")
    names = [one if isinstance(one, str) else one.info.name for one in _listed(chosen) if _named(one)]
    return names[0] if len(names) == 1 and names[0] not in CORE and names[0] in NAMES else ""


def _named(one: Any) -> bool:
    return isinstance(one, str) or hasattr(one, "info")


def _other_turn(params: dict[str, Any]) -> bool:
    """Whether a method outside the core leaves this family to others."""
    family, name = params.get("tiny"), params.get("acting")
    if name is None or family not in OTHERS or name in CORE:
        return False
    return bool((NAMES.index(name) + OTHERS.index(family)) % 2)


def _listed(chosen: Any) -> list[Any]:
    return list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]


@pytest.fixture(params=vlm.MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """Each tiny model in turn; do not change it."""
    return _model(request.param)


@pytest.fixture
def llava() -> Any:
    """The tiny LLaVA; do not change it."""
    return _model("llava")


@pytest.fixture
def built() -> Any:
    """A tiny model by name; do not change it."""
    return _model
