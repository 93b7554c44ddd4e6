"""Reading and writing files: every failure is one line that names the file."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import pytest

from mmfix_evals import files
from mmfix_evals.errors import DataError


def test_blank_lines_are_ignored_and_places_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": 1}\r\n\n  \n{"a": "\u2028"}\n\n', encoding="utf-8")
    rows = files.read_rows(path)
    assert rows == [{"a": 1}, {"a": "\u2028"}]
    assert rows.place(1) == f"{path}, line 4"
    assert files.place(rows, 0, "answer") == f"{path}, line 1"
    assert files.place([{}], 0, "answer") == "answer 1"


def test_a_json_array_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n[{"a": 1}, {"a": 2}]')
    assert files.read_rows(path).place(1) == f"{path}, item 2"


def test_gzip_is_recognised_by_content_and_hashed_unpacked(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.json", tmp_path / "b.json"
    plain.write_bytes(b'{"a": 1}')
    packed.write_bytes(gzip.compress(b'{"a": 1}'))
    assert files.read_json(packed) == {"a": 1}
    assert files.sha256(packed) == files.sha256(plain) == hashlib.sha256(b'{"a": 1}').hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: not valid JSON"),
        (b'{"a": 1}\n3\n', r"a\.jsonl, line 2: expected a JSON object \{…\}, found int"),
        (b'[{"a": 1}, 3]', r"a\.jsonl, item 2: expected a JSON object"),
        (b'[{"a": 1},\n 3', r"a\.jsonl, line 2: not valid JSON"),
        (b'{"a": "\xff"}', r"a\.jsonl: not UTF-8 text \(byte 7\)"),
        (b"\x1f\x8b broken", r"a\.jsonl: broken gzip file"),
        (gzip.compress(b'{"a": 1}', mtime=0)[:-6], r"a\.jsonl: broken gzip file"),
        (b'{"a":' * 100_000, r"a\.jsonl, line 1: JSON is nested too deeply"),
        (b"[" * 100_000, r"a\.jsonl: JSON is nested too deeply"),
    ],
)
def test_bad_content(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        files.read_rows(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(DataError, match="is a folder"):
        files.read_json(tmp_path)


def test_bad_json_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(DataError, match=r"a\.json, line 3: not valid JSON"):
        files.read_json(tmp_path / "a.json")


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.txt"
    files.write_text_atomic(path, "old\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text_atomic(path, "new\n")
    assert path.read_bytes() == b"old\n"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_file_that_cannot_be_written_is_named_as_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", Path("/proc/report.html")):
        with pytest.raises(OSError) as caught:  # noqa: PT011  (which one depends on the system)
            files.write_text_atomic(path, "text")
        assert caught.value.filename == str(path)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "mmfix"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_dir() == Path.home() / ".cache" / "mmfix"
