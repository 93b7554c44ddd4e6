"""Steering directions of tiny models, at random, where the method that reads them is told to look."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from mmfix.calibration import _cache_file
from mmfix.directions import Directions, save
from mmfix.families import describe

FOLDER = tempfile.mkdtemp(prefix="mmfix-directions-")
atexit.register(shutil.rmtree, FOLDER, True)


def made(model: Any, seed: int = 0) -> Directions:
    """Directions of a model: one per layer, and one per layer of its tower."""
    family = describe(model)
    generator = torch.Generator().manual_seed(seed)
    width = family.tower_attentions[0].config.hidden_size
    text = torch.randn(family.num_layers, family.hidden_size, generator=generator)
    return Directions(text, torch.randn(len(family.tower_attentions), 1, width, generator=generator))


def calibrated(model: Any) -> Any:
    """The model, once its directions are written."""
    file = save(model, made(model), Path(FOLDER))
    file.rename(Path(FOLDER) / _cache_file(model).with_suffix(".vti.safetensors").name)
    return model
