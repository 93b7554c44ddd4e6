"""A model is left exactly as it was found: recorded before, and compared after."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

from torch import nn

from mmfix.errors import RestoreError

# Instance attributes that a mitigation may put over a class's own.
OVERRIDES = (
    "forward",
    "get_image_features",
    "get_compiled_call",
    "generate",
    "_prefill",
    "generate_batch",
    "init_continuous_batching",
)
ATTRIBUTE = "_mmfix"  # on attention modules: their state


class Snapshot:
    """State of a model that a mitigation may touch: configs, attention settings, hooks, module attributes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.configs = {name: module.__dict__.get("config") for name, module in model.named_modules()}
        self.settings = {
            id(config): (name or "the model", config, config._attn_implementation_internal)
            for name, config in reversed(self.configs.items())
            if hasattr(config, "_attn_implementation_internal")
        }
        self.traits = {name: _traits(module) for name, module in model.named_modules()}
        self.hook_ids: set[int] = set()  # ids of the hooks that the mitigation installs

    def verify(self, disturbed: list[str]) -> None:
        """Raise ``RestoreError`` naming everything that is not as it was, and everything `disturbed` in between."""
        left = []
        for name, config, value in self.settings.values():
            now = getattr(config, "_attn_implementation_internal", None)
            if now != value:
                left.append(f"attention setting of {name} is {now!r}, was {value!r}")
        for name, module in self.model.named_modules():
            label = name or type(module).__name__
            if ATTRIBUTE in module.__dict__:
                left.append(f"{label} still carries mmfix state")
            if module.__dict__.get("config") is not self.configs.get(name):
                left.append(f"{label}.config was replaced and not put back")
            changed = [key for key, value in _traits(module).items() if self.traits.get(name, {}).get(key) != value]
            left += [f"{label}.{key} was replaced and not put back" for key in changed]
            if self.hook_ids & {*module._forward_hooks, *module._forward_pre_hooks}:
                left.append(f"{label} still has a hook")
        if left:
            raise RestoreError(f"the model is not as it was before mitigate(): {_listed(left)}; reload the model")
        if disturbed:
            raise RestoreError(
                f"something else changed the model inside the mitigate() block and has not undone it: "
                f"{_listed(disturbed)}; the model is as it was before the block, but what ran inside it may not have "
                "been mitigated. Leave blocks in the reverse order of entering them"
            )


class PrivateConfigs:
    """Configs of one model's own for a while, so that a model that shares the config object sees no change."""

    def __init__(self, model: nn.Module) -> None:
        memo: dict[int, Any] = {}
        self.replaced: list[tuple[nn.Module, Any]] = []
        for module in model.modules():
            config = module.__dict__.get("config")
            if config is not None and hasattr(config, "_attn_implementation_internal"):
                own = copy.deepcopy(config, memo)
                self.replaced.append((module, config))
                module.__dict__["config"] = own

    def put_back(self) -> None:
        """The configs that were there, with what the user set on their copies in the meantime."""
        for module, config in self.replaced:
            own = module.__dict__.get("config")
            for name, value in vars(own).items() if type(own) is type(config) else ():
                simple = not name.startswith("_") and not hasattr(value, "_attn_implementation_internal")
                if simple and getattr(config, name, None) != value:
                    setattr(config, name, value)
            module.__dict__["config"] = config


def _traits(module: nn.Module) -> dict[str, int | None]:
    found = {name: module.__dict__.get(name) for name in OVERRIDES}
    return {name: None if value is None else id(value) for name, value in found.items()}


def _listed(faults: list[str]) -> str:
    more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
    return "; ".join(faults[:5]) + more


def override(owner: Any, name: str, value: Any, stack: ExitStack) -> None:
    """Put an attribute on one instance; `stack` takes it away, or puts back what somebody else had put there."""
    if name in owner.__dict__:
        stack.callback(owner.__dict__.__setitem__, name, owner.__dict__[name])
    else:
        stack.callback(owner.__dict__.pop, name, None)
    owner.__dict__[name] = value
