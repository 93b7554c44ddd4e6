"""Tiny models shared by the contract tests, made once per session; each test sees them unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import steered, vlm

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

CORE = ("causalmm", "causalmm-language", "causalmm-vision", "mma", "plausibility", "var", "vhr")
_BUILT: dict[str, Any] = {}


def _model(name: str) -> Any:
    if name not in _BUILT:
        _BUILT[name] = steered.calibrated(vlm.build(name))
    return _BUILT[name]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Methods outside the core run on one of the two LLaVAs, the one with grouped queries, and on the other families.

    There are many of them, and what the other one adds (as many key heads as query heads) is the simpler case.
    """
    spared = [item for item in items if _simpler(getattr(item, "callspec", None))]
    config.hook.pytest_deselected(items=spared)
    items[:] = [item for item in items if item not in set(spared)]


def _simpler(spec: Any) -> bool:
    if spec is None or spec.params.get("model") != "llava":
        return False
    chosen = spec.params.get("name") or spec.params.get("method") or spec.params.get("methods")
    names = [one if isinstance(one, str) else one.info.name for one in _listed(chosen) if one is not None]
    return len(names) == 1 and names[0] not in CORE


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
