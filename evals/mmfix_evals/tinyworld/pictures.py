"""The training pictures, rendered once and kept as one uint8 array on disk."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np

from mmfix_evals.tinyworld.draw import render
from mmfix_evals.tinyworld.world import CATEGORIES, SIZE, Scene, scene


def _render(index: int) -> np.ndarray[Any, Any]:
    return np.asarray(render(scene("train", index)))


def data_hash(count: int = 64) -> str:
    """sha256 over the first training scenes and their pixels: names the world that a model was trained on."""
    digest = hashlib.sha256()
    for index in range(count):
        digest.update(repr(scene("train", index)).encode())
        digest.update(_render(index).tobytes())
    return digest.hexdigest()


def training_pictures(count: int, folder: Path, processes: int, progress: Any = None) -> np.ndarray[Any, Any]:
    """The first `count` training pictures, uint8 [count, 96, 96, 3], memory-mapped from `folder`; made if missing."""
    path = folder / f"pictures-{data_hash(16)[:12]}-{count}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npy")
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(count, SIZE, SIZE, 3))
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for index, picture in enumerate(pool.imap(_render, range(count), chunksize=64)):
                array[index] = picture
                if progress is not None and index % 500 == 0:
                    progress(index, count)
        array.flush()
        os.replace(temporary, path)
    return np.load(path, mmap_mode="r")


def patch_labels(items: list[Scene], patch: int) -> np.ndarray[Any, Any]:
    """Bool [N, patches, categories]: a patch shows an object if at least 0.3 of it, or of the object, is covered."""
    side = SIZE // patch
    labels = np.zeros((len(items), side, side, len(CATEGORIES)), dtype=bool)
    for n, item in enumerate(items):
        for placed in item.objects:
            x, y, w, h = placed.box
            for row in range(max(0, y // patch), min(side, (y + h - 1) // patch + 1)):
                for column in range(max(0, x // patch), min(side, (x + w - 1) // patch + 1)):
                    wide = min(x + w, (column + 1) * patch) - max(x, column * patch)
                    high = min(y + h, (row + 1) * patch) - max(y, row * patch)
                    if wide * high >= 0.3 * min(patch * patch, w * h):
                        labels[n, row, column, CATEGORIES.index(placed.category)] = True
    return labels.reshape(len(items), side * side, len(CATEGORIES))
