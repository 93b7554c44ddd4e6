"""Reading JSON, JSON Lines and their gzip forms, with errors that name file and line; atomic writing; hashes."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmfix_evals.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"


class Rows(list[dict[str, Any]]):
    """Records of one file together with where each came from (`place(i)`), for error messages."""

    def __init__(self, rows: Iterable[dict[str, Any]], path: Path, lines: Sequence[int], unit: str = "line") -> None:
        super().__init__(rows)
        self.path = path
        self.lines = list(lines)
        self.unit = unit

    def place(self, index: int) -> str:
        """`file, line 17` for record `index`."""
        return f"{self.path}, {self.unit} {self.lines[index]}"


def place(rows: Sequence[Any], index: int, what: str) -> str:
    """Where record `index` of `rows` stands: file and line if known, otherwise `what` and its number from 1."""
    return rows.place(index) if isinstance(rows, Rows) else f"{what} {index + 1}"


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file, unpacked if it is gzip (recognised by content, not by name).

    Raises DataError if the file is missing, not a readable file, or a broken gzip.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not a file; give the path of a file in it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip file ({error}); download or write it again") from None


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file (a byte-order mark is dropped); DataError names the offset of a bad byte."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
        raise DataError(message) from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file. Raises DataError naming the line of the first mistake (see :func:`loads`)."""
    try:
        return loads(read_text(path))
    except json.JSONDecodeError as error:
        message = f"{path}, line {error.lineno}: not valid JSON ({error.msg}); correct the file"
        raise DataError(message) from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); correct the file") from None
    except RecursionError:
        raise DataError(f"{path}: JSON is nested too deeply; correct the file") from None


def loads(text: str) -> Any:
    """Strict JSON: what Python would let pass and turn into a wrong number is refused with ValueError.

    That is NaN and infinity, a name that occurs twice in one object (the last would win), and half of a character
    (a lone surrogate, which cannot be written again).
    """
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark within the text")
    value = _strict().decode(text)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a character: a lone surrogate such as \\ud800") from None
    return value


@lru_cache(maxsize=1)
def _strict() -> json.JSONDecoder:
    """Made once: json.loads would make one for every line."""
    return json.JSONDecoder(parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_unique)


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if number - number != 0:
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:40]!r} occurs twice in one object")
    return found


def read_rows(path: str | os.PathLike[str]) -> Rows:
    """The records of a JSON Lines file, or of a JSON array of objects; blank lines are ignored.

    Raises DataError naming file and line if a line is not a JSON object.
    """
    path = Path(path)
    text = read_text(path)
    if text.lstrip().startswith("["):
        values = read_json(path)
        rows = Rows(values, path, range(1, len(values) + 1), unit="item")
    else:
        # Split at "\n" only: str.splitlines would also split at U+2028, which is legal inside a JSON string.
        numbered = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = Rows((_parse_line(path, i, line) for i, line in numbered), path, [i for i, _ in numbered])
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{rows.place(index)}: expected a JSON object {{…}}, found {type(row).__name__}")
    return rows


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return loads(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        message = f"{path}, line {number}: not valid JSON ({reason}); correct or delete that line"
        raise DataError(message) from None
    except RecursionError:
        raise DataError(f"{path}, line {number}: JSON is nested too deeply; correct or delete that line") from None


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of the content; a gzip file is hashed unpacked, so that it equals its plain copy."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text so that `path` always holds either the old or the complete new content.

    A temporary file beside it is written, synced and renamed. OSError (disk full, no permission) passes through
    and leaves the old file and no temporary one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(problem, OSError) and problem.filename is not None:
            problem.filename = str(path)  # the file that was asked for, not the one beside it
        raise


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Delete temporary files that a killed :func:`write_text_atomic` of `path` left; only for its one writer."""
    path = Path(path)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def cache_dir() -> Path:
    """The user's cache folder of mmfix: `$XDG_CACHE_HOME/mmfix`, else `~/.cache/mmfix`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mmfix"
