"""Malformed files of every scorer: one line that names the file, a counted skip, or the same numbers. Never others."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from fuzzing import QUICK, SCORERS, WRONG, at, encoded, harmless, numbers, outcome, places, plain, replaced
from hypothesis import given
from hypothesis import strategies as st

from mmfix_evals.errors import DataError, EvalError

EVERY = pytest.mark.parametrize("name", SCORERS)


@EVERY
def test_what_editors_do_to_a_file_changes_no_number(name: str, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    whole = plain(scorer, tmp_path)
    for changed, value in scorer.content.items():
        data = encoded(changed, value)
        for other in (b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data + b"\n\n", data.rstrip(b"\n")):
            found = outcome(scorer, tmp_path, scorer.content, changed, other)
            assert numbers(found) == numbers(whole), (changed, found)
        if name != "coco":  # read by the library of COCO, which unpacks nothing
            found = outcome(scorer, tmp_path, scorer.content, changed, gzip.compress(data))
            assert numbers(found) == numbers(whole), (changed, found)


@EVERY
def test_another_encoding_is_named(name: str, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    for changed, value in scorer.content.items():
        for data in (encoded(changed, value).decode().encode("utf-16"), encoded(changed, value) + b"\xe9\xff"):
            found = outcome(scorer, tmp_path, scorer.content, changed, data)
            assert isinstance(found, EvalError), (changed, found)
            assert changed in str(found)


@EVERY
@given(data=st.data())
@QUICK
def test_damaged_bytes(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """Cut, overwritten, doubled and mixed up: never an exception of another kind, never a number that is none."""
    scorer = SCORERS[name]
    changed = data.draw(st.sampled_from(sorted(scorer.content)))
    raw = encoded(changed, scorer.content[changed])
    place = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(place, min(len(raw), place + 40)))
    pieces = [
        b"",
        b"\0",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"null",
        b'"',
        b"[",
        b"{",
        b"\\ud800",
        b"\xff",
        b"\n",
        b"9" * 5000,
    ]
    middle = data.draw(st.one_of(st.sampled_from(pieces), st.binary(max_size=8)))
    damaged = data.draw(st.sampled_from([raw[:place], raw[:place] + middle + raw[end:], raw + raw[place:]]))
    outcome(scorer, tmp_path, scorer.content, changed, damaged)


@EVERY
@given(data=st.data())
@QUICK
def test_wrong_types_anywhere(name: str, data: st.DataObject, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    changed = data.draw(st.sampled_from(sorted(n for n, v in scorer.content.items() if not isinstance(v, str)) or [""]))
    if not changed:
        return
    value = scorer.content[changed]
    path = data.draw(st.sampled_from(places(value)[1:]))
    new = replaced(value, path, data.draw(st.sampled_from(WRONG)))
    outcome(scorer, tmp_path, scorer.content, changed, encoded(changed, new))


@EVERY
def test_doubled_records_are_refused_counted_or_without_effect(name: str, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    whole = plain(scorer, tmp_path)
    for changed, value in scorer.content.items():
        lists = [path for path in places(value) if isinstance(at(value, path), list) and at(value, path)]
        for path in lists:
            old = at(value, path)
            for new in ([*old, old[0]], [old[-1], *old]):
                found = outcome(scorer, tmp_path, scorer.content, changed, encoded(changed, replaced(value, path, new)))
                assert harmless(found, whole), (changed, path)
        if isinstance(value, str) and "\t" in value:
            lines = value.splitlines(keepends=True)
            found = outcome(scorer, tmp_path, scorer.content, changed, "".join([*lines, lines[0]]).encode())
            assert harmless(found, whole)


@EVERY
def test_a_name_that_stands_twice_in_one_object_is_refused(name: str, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    for changed, value in scorer.content.items():
        text = encoded(changed, value).decode()
        if not isinstance(value, str) and '": ' in text:
            first = text[text.index('"') : text.index('": ') + 3]
            doubled = text.replace(first, f"{first}0, {first}", 1)
            found = outcome(scorer, tmp_path, scorer.content, changed, doubled.encode())
            assert isinstance(found, DataError), (changed, found)
            assert changed in str(found)
            assert "occurs twice" in str(found)
