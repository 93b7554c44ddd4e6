"""The identity of a model's files, so that answers of changed weights are never reused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

SUFFIXES = (".safetensors", ".json", ".bin", ".pt", ".model", ".txt", ".jinja")
NOT_THE_MODELS = (
    "mmfix-vti.safetensors",
)  # steering directions: a parameter of one method, with a provenance of its own


def fingerprint(decoder: Any) -> dict[str, Any]:
    """``{"id", "revision", "sha256"}`` of a loaded decoder's model.

    ``sha256`` covers names and contents of the weight, configuration and tokenizer files of a local folder. A model of
    a hub has the commit it was loaded at instead.
    """
    model = getattr(decoder, "model", None)
    config = getattr(model, "config", None)
    revision = getattr(config, "_commit_hash", None)
    folder = Path(str(getattr(config, "_name_or_path", "") or getattr(decoder, "model_id", "")))
    return {
        "id": str(decoder.model_id),
        "revision": revision,
        "sha256": folder_sha256(folder) if folder.is_dir() else None,
    }


def folder_sha256(folder: Path) -> str:
    """Hash over the names and contents of a model folder's own files."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and path.name not in NOT_THE_MODELS and path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.name}\0{content}\n".encode())
    return total.hexdigest()
