"""Files and folders that a command will write, refused before the work and not after it."""

from __future__ import annotations

import os
from pathlib import Path

from mmfix_evals.errors import DataError, UsageError


def picture(option: str, path: Path | None) -> None:
    """Refuse a picture that would not be what its name says: only SVG is drawn."""
    if path is not None and path.suffix.lower() != ".svg":
        raise UsageError(f"{option} {path}: pictures are drawn as SVG; give a name that ends in .svg")
    if path is not None:
        folder(option, path.parent)


def folder(option: str, path: Path | None) -> None:
    """Refuse a folder in which nothing can be written; one that does not exist yet may be made."""
    if path is None:
        return
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DataError(f"{option} {path}: nothing can be written there; choose a writable folder")
