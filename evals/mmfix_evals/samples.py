"""``samples.jsonl``: one line per answer, appended and flushed as soon as it exists, never rewritten.

A sample is found again by its ``key``, the hash of everything that decides the answer; changing any of it makes a new
sample, so stale answers cannot be mixed in. ``protocol`` is the part of that which all methods of a run share: the
samples of one protocol are scored together.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from mmfix_evals.errors import DataError
from mmfix_evals.files import loads

Sample = dict[str, Any]
NAME = "samples.jsonl"


def canonical(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def sample_key(
    *,
    task: str,
    doc_id: str,
    prompt: str,
    image_sha256: str,
    model: Mapping[str, Any],
    method: Mapping[str, Any],
    generation: Mapping[str, Any],
    seed: int,
) -> str:
    """The identity of one answer."""
    return digest(
        {
            "task": task,
            "doc_id": doc_id,
            "prompt": prompt,
            "image_sha256": image_sha256,
            "model": model,
            "method": method,
            "generation": generation,
            "seed": seed,
        }
    )


def read(path: Path) -> tuple[list[Sample], int, str | None]:
    """All samples of a file, the length in bytes of its intact part, and a warning about a torn last line.

    A crash while writing can leave the *last* line incomplete; any other bad line means that the file was changed.

    Raises:
        DataError: a line in the middle is not a JSON object; names the line.
    """
    samples: list[Sample] = []
    intact = 0
    with path.open("rb") as file:
        lines = file.readlines()
    for number, line in enumerate(lines, 1):
        last = number == len(lines)
        try:
            sample = loads(line.decode()) if line.strip() else None
            if line.strip():
                _check(sample)
            if last and not line.endswith(b"\n"):
                raise ValueError("no line break at its end")
        except (ValueError, RecursionError) as problem:
            if last:
                return samples, intact, f"{path}: dropped line {number}, torn while it was written"
            raise DataError(f"{path}, line {number}: not a sample ({problem}). Delete this line to go on") from None
        intact += len(line)
        if sample is not None:
            samples.append(sample)
    return samples, intact, None


TEXTS = ("key", "protocol", "task", "data_split", "split", "doc_id", "image", "image_sha256", "method", "prompt")


def _check(sample: Any) -> None:
    """Raise ValueError for an object that no run has written."""
    if not isinstance(sample, dict) or "key" not in sample:
        raise ValueError("not a sample object with a key")
    for name in TEXTS:
        if not isinstance(sample.get(name), str):
            raise ValueError(f"{name!r} is missing or not a text")
    wanted = "response" if sample.get("error") is None else "error"
    if not isinstance(sample.get(wanted), str):
        raise ValueError(f"{wanted!r} is missing or not a text")
    passes = sample.get("passes_per_token")
    fired = sample.get("fired") or {}
    pairs = list(fired.values()) if isinstance(fired, dict) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("'fired' is not a table of pairs")
    numbers = [sample.get("seconds"), sample.get("tokens"), *(number for pair in pairs for number in pair)]
    for number in numbers if passes is None else [*numbers, passes]:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or number < 0:
            raise ValueError(f"{number!r} is not a time or a number of tokens or passes")


class SampleLog:
    """The samples of a run directory, open for appending by one process at a time.

    Attributes:
        by_key: every finished sample; of several lines with one key the last counts.
        warning: what was repaired when the file was opened, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.by_key: dict[str, Sample] = {}
        self.warning: str | None = None
        # No buffer: what write() took has left the process, and a failed write leaves nothing to be written later.
        self._file: FileIO = self.path.open("ab", buffering=0)
        try:
            _lock(self._file, self.path)
            samples, self._intact, self.warning = read(self.path)
            if self.warning:
                self._file.truncate(self._intact)
        except BaseException:
            self._file.close()
            raise
        for sample in samples:
            self.by_key[sample["key"]] = sample

    def append(self, samples: Iterable[Sample]) -> None:
        """Write the samples of one batch. If the disk refuses, whole lines stay and the torn one is cut off."""
        for sample in samples:
            line = (json.dumps(sample, ensure_ascii=False, default=str) + "\n").encode()
            try:
                self._write(line)
            except OSError as problem:
                self._file.truncate(self._intact)
                raise OSError(problem.errno, problem.strerror, str(self.path)) from problem
            self._intact += len(line)
            self.by_key[sample["key"]] = sample

    def _write(self, line: bytes) -> None:
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lock(file: FileIO, path: Path) -> None:
    """One writer per run directory; released by the system when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such lock on this system; two writers would only waste work
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EAGAIN, errno.EACCES):
            raise DataError(f"{path}: another run is writing here. Wait for it, or choose another --out") from None
