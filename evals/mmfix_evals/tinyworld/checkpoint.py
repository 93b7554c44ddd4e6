"""Training state on disk: safetensors and JSON, replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_WEIGHTS, _STATE = "checkpoint.safetensors", "checkpoint.json"


def save(folder: Path, trainee: Any, optimiser: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
    """Write weights, optimiser moments and `state`; a kill at any moment leaves the old or the new set usable.

    The weights file is named by its step and the JSON file, written last, names the weights file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"w.{name}": value.detach().clone().contiguous() for name, value in trainee.state_dict().items()}
    if optimiser is not None:
        for index, moments in optimiser.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"o.{index}.{name}"] = torch.as_tensor(value).clone()
    name = f"{state['stage']}-{state['step']}-{_WEIGHTS}"
    save_file(tensors, folder / f".{name}.tmp")
    os.replace(folder / f".{name}.tmp", folder / name)
    temporary = folder / f".{_STATE}.tmp"
    temporary.write_text(json.dumps({**state, "weights": name}, indent=1) + "\n")
    os.replace(temporary, folder / _STATE)
    for old in folder.glob(f"*-{_WEIGHTS}"):
        if old.name != name:
            old.unlink()


def read_state(folder: Path) -> dict[str, Any] | None:
    """The JSON of the newest checkpoint, or None."""
    path = folder / _STATE
    return json.loads(path.read_text()) if path.is_file() else None


def load(folder: Path, state: dict[str, Any], trainee: Any, optimiser: torch.optim.Optimizer | None) -> None:
    """Put a checkpoint's weights and moments back."""
    tensors = load_file(folder / state["weights"])
    trainee.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    if optimiser is not None:
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("o."):
                _, index, name = key.split(".", 2)
                moments.setdefault(int(index), {})[name] = value
        if moments:
            optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
