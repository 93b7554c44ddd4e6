"""What a judge has answered already: a JSON Lines file, one line per request, synced before the next is sent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfix_evals.errors import DataError


def digest(request: Mapping[str, Any]) -> str:
    """Hex sha256 of a request `{"url", "body"}` in canonical JSON."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


class Cache:
    """Records `{"key", "request", "text", "model", "finish_reason", "usage"}` by the sha256 of their request.

    A last line that was cut off in mid-write is ignored and overwritten; anything else that is wrong is refused.

    Args:
        path: the file; it need not exist.

    Raises:
        DataError: a line is not such a record, or its key is not the hash of its request.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.records: dict[str, dict[str, Any]] = {}
        self._complete = 0  # bytes of complete lines
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); check the path") from None
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            self._complete += len(line)
            if line.strip():
                record = self._parse(line, number)
                self.records[record["key"]] = record

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            key, text, request = record["key"], record["text"], record["request"]
        except (ValueError, KeyError, TypeError, RecursionError):
            key = text = request = record = None
        if not isinstance(text, str) or not isinstance(request, dict) or key != digest(request):
            raise DataError(f"{self.path}, line {number}: no record of a judge's answer; delete the line to ask again")
        assert isinstance(record, dict)
        return record

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a request, or None."""
        return self.records.get(key)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(record, ensure_ascii=True) + "\n").encode()
        with open(self.path, "ab") as stream:
            if stream.tell() > self._complete:
                stream.truncate(self._complete)
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self._complete += len(line)
        self.records[record["key"]] = record
