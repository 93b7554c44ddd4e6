"""What a calibration has found so far, part by part, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from mmfix.storage import write_bytes

Part = dict[str, Tensor]


class Parts:
    """Tensors by name, each computed once.

    A part is a safetensors file that names the work it belongs to. One that cannot be read, or that belongs to other
    work, is computed again, and `say` is told. A part is written whole or not at all, so that a calibration which was
    stopped and goes on ends in the same values, to the last bit, as one that was not.

    Args:
        folder: of the files; None keeps nothing and computes everything.
        key: whatever decides the parts: model, revision, hash of the data, parameters; as JSON.
        say: told, in one line, what was not used.
    """

    def __init__(
        self,
        folder: Path | None = None,
        key: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder = folder
        self.key = hashlib.sha256(json.dumps(key or {}, sort_keys=True).encode()).hexdigest()
        self.say = say

    def get(self, name: str, compute: Callable[[], Part]) -> Part:
        """The part of that name: as found in its file, else computed and written down.

        Raises:
            MmfixError: the file cannot be written.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.safetensors"
        found = self._read(path) if path.is_file() else None
        if found is None:
            found = {what: tensor.detach().cpu().contiguous() for what, tensor in compute().items()}
            write_bytes(path, to_bytes(found, {"mmfix": self.key}))
        return found

    def __len__(self) -> int:
        """Parts that an earlier run left."""
        return 0 if self.folder is None else len(list(self.folder.glob("[!.]*.safetensors")))

    def done(self) -> None:
        """The calibration is complete: nothing is left to resume."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, path: Path) -> Part | None:
        try:
            with safe_open(path, "pt") as content:
                if (content.metadata() or {}).get("mmfix") == self.key:
                    return {what: content.get_tensor(what) for what in content.keys()}  # noqa: SIM118
            reason = "belongs to another model, other data or other parameters"
        except (OSError, ValueError, SafetensorError) as error:
            reason = f"is not readable ({error})"
        self.say(f"{path} {reason}; that part is computed again")
        return None
