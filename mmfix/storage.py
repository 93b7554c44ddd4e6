"""Files written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmfix.errors import MmfixError


def write_bytes(path: Path, content: bytes) -> Path:
    """Write through a temporary file beside it, so that `path` holds the old or the whole new content.

    Raises:
        MmfixError: the folder cannot be written; no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise MmfixError(f"cannot write {path}: {error.strerror}; choose a writable folder") from error
    return path


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """The same for JSON, indented."""
    return write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
