"""What a mitigation changes, noted before and compared after."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmfix.errors import RestoreError
from mmfix.hooks import ATTRIBUTE


class Snapshot:
    """State of a model that a mitigation may touch: attention settings, hooks, module attributes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.settings = _settings(model)
        self.modules = {name: _traits(module) for name, module in model.named_modules()}
        self.hook_ids: set[int] = set()  # ids of the hooks that the mitigation installs

    def verify(self) -> None:
        """Raise ``RestoreError`` naming everything that is not as it was."""
        left = []
        for key, (config, value) in self.settings.items():
            now = getattr(config, "_attn_implementation_internal", None)
            if now != value:
                left.append(f"attention setting of {key} is {now!r}, was {value!r}")
        for name, module in self.model.named_modules():
            label = name or type(module).__name__
            if ATTRIBUTE in module.__dict__:
                left.append(f"{label} still carries mmfix state")
            if self.modules.get(name) != _traits(module):
                left.append(f"{label}.forward was replaced and not put back")
            if self.hook_ids & {*module._forward_hooks, *module._forward_pre_hooks}:
                left.append(f"{label} still has a hook")
        if left:
            raise RestoreError(
                f"the model is not as it was before mitigate(): {'; '.join(left[:5])}"
                f"{f' and {len(left) - 5} more' if len(left) > 5 else ''}; reload the model"
            )


def _traits(module: nn.Module) -> int | None:
    forward = module.__dict__.get("forward")
    return None if forward is None else id(forward)


def _settings(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every distinct config below the model with its attention setting, by the first module that holds it."""
    found: dict[int, tuple[str, Any, Any]] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), (name or "the model", config, config._attn_implementation_internal))
    return {name: (config, value) for name, config, value in found.values()}
