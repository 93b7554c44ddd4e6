"""Bars from records, as SVG written by hand: one group per case, one bar per arm or backend."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmfix_evals.bench.table import machine_of, name_of, newest, read
from mmfix_evals.errors import DataError

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
WIDTH, LEFT, BAR, GAP, TOP = 900, 330, 13, 14, 56


def write_plots(records: Sequence[Path], out: Path) -> list[Path]:
    """One SVG per file of records, beside each other in `out`.

    Raises:
        DataError: a file holds nothing that was measured.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for path in records:
        found = [record for record in newest(read(path)) if value_of(record) is not None]
        if not found:
            raise DataError(f"{path}: no measurement in it; run `mmfix bench` first")
        target = out / f"{path.stem}.svg"
        target.write_text(bars(found), encoding="utf-8")
        written.append(target)
    return written


def value_of(record: dict[str, Any]) -> float | None:
    """What is drawn: decode speed over vanilla, or time over SDPA without edits."""
    value = record.get("decode_speed", record.get("ratio_to_sdpa"))
    return None if value is None else float(value)


def bars(records: list[dict[str, Any]]) -> str:
    """The picture; a thin line stands at 1, the vanilla of the same run."""
    decode = "decode_speed" in records[0]
    names = list(dict.fromkeys(name_of(record) for record in records))
    cases: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        cases.setdefault(record["case"], []).append(record)
    widest = max(value_of(record) or 0.0 for record in records)
    scale = (WIDTH - LEFT - 70) / max(widest, 1.0)
    title = "decode speed over plain greedy decoding" if decode else "time over SDPA without edits"
    body, at = [], TOP + 16 * ((len(names) + 3) // 4)
    for case, found in cases.items():
        body.append(_text(LEFT - 8, at + BAR * len(found) / 2 + 4, case, "end"))
        for record in found:
            value = value_of(record) or 0.0
            colour = COLOURS[names.index(name_of(record)) % len(COLOURS)]
            body.append(f'<rect x="{LEFT}" y="{at}" width="{value * scale:.1f}" height="{BAR - 2}" fill="{colour}"/>')
            body.append(_text(LEFT + value * scale + 4, at + BAR - 3, f"{value:.2f}"))
            at += BAR
        at += GAP
    line = LEFT + scale
    body.append(f'<line x1="{line:.1f}" x2="{line:.1f}" y1="{TOP}" y2="{at}" stroke="#888" stroke-dasharray="3 3"/>')
    for n, name in enumerate(names):
        x, y = 12 + (n % 4) * 220, TOP - 8 + 16 * (n // 4)
        body.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{COLOURS[n % len(COLOURS)]}"/>')
        body.append(_text(x + 15, y, name))
    machines = "; ".join(dict.fromkeys(machine_of(record) for record in records))
    head = _text(12, 20, title, weight="bold") + _text(12, 34, machines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {at + 8}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="{WIDTH}" height="{at + 8}" fill="white"/>\n{head}\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    shown = escape(text if len(text) < 60 else text[:57] + "…")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{shown}</text>'
