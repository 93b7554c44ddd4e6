"""The speed tables, made from committed records: what was measured, beside what, on which machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

UNMEASURED = (
    "Not yet measured on a GPU: the Triton kernels are proven in Triton's interpreter and compile for sm_80, sm_90 and "
    "sm_100, but no time of them is known."
)
Record = dict[str, Any]


def speed_table(folder: Path) -> str:
    """Markdown tables of all records in a folder (``kernels.jsonl`` and ``decode.jsonl``), newest measurement of each.

    One table per machine and kind of record, and a sentence that says so while no record comes from a GPU.
    """
    parts = []
    decode, kernels = (newest(read(folder / name)) for name in ("decode.jsonl", "kernels.jsonl"))
    for machine, records in by_machine(decode):
        parts.append(f"Whole model, {machine}:\n\n{decode_table(records)}")
    for machine, records in by_machine(kernels):
        parts.append(f"Attention alone, {machine}; time over SDPA without edits:\n\n{kernel_table(records)}")
    for machine, records in by_machine(kernels + decode):
        if shown := memory_table(records):
            parts.append(f"Growth of peak memory with length, {machine}:\n\n{shown}")
    if not any(record.get("device_type") == "cuda" for record in decode + kernels):
        parts.append(UNMEASURED)
    return "\n\n".join(parts)


def read(path: Path) -> list[Record]:
    """The records of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def newest(records: Iterable[Record]) -> list[Record]:
    """The last record of each (machine, case, arm or backend)."""
    kept: dict[tuple[str, ...], Record] = {}
    for record in records:
        kept[machine_of(record), record["case"], record.get("arm", ""), record["backend"]] = record
    return list(kept.values())


def machine_of(record: Record) -> str:
    """One phrase: device, and the versions that its speed depends on."""
    device = record["device"]
    if record.get("device_type") == "cpu":
        device += f", {record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    return f"{device}, torch {record['torch']}"


def by_machine(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(machine_of(record), []).append(record)
    return list(found.items())


def decode_table(records: list[Record]) -> str:
    """Every arm beside plain greedy decoding, with the 20th and 80th percentile of the paired rounds."""
    lines = ["| model and prompt | arm | decode speed | prefill time | tokens/s |", "| --- | --- | --- | --- | ---: |"]
    for record in records:
        start = f"| {record['case']} | `{record['arm']}` |"
        if "unmeasured" in record:
            lines.append(f"{start} {record['unmeasured']} | | |")
            continue
        speed, time = (_range(record, name) for name in ("decode_speed", "prefill_time"))
        lines.append(f"{start} {speed} | {time} | {record['tokens_per_s']:.1f} |")
    return "\n".join(lines)


def _range(record: Record, name: str) -> str:
    return f"{record[name]:.2f} [{record[name + '_p20']:.2f}, {record[name + '_p80']:.2f}]"


def kernel_table(records: list[Record]) -> str:
    """One line per case, one column per backend."""
    backends = list(dict.fromkeys(record["backend"] for record in records if "p50" in record))
    cases: dict[str, dict[str, Record]] = {}
    for record in records:
        cases.setdefault(record["case"], {})[record["backend"]] = record
    lines = [f"| case | {' | '.join(backends)} | floor |", f"| --- |{' ---: |' * (len(backends) + 1)}"]
    for case, found in cases.items():
        cells = [_ratio(found.get(name)) for name in backends]
        floor = next((f"{one['floor'] * 1e6:.1f} µs" for one in found.values() if "floor" in one), "")
        lines.append(f"| {case} | {' | '.join(cells)} | {floor} |")
    return "\n".join(lines)


def memory_table(records: list[Record]) -> str:
    """A parabola through the peak memory of each case that was measured at three lengths; "" where none was."""
    series: dict[tuple[str, str], dict[int, int]] = {}
    for record in records:
        length = record.get("length", record.get("keys"))
        if record.get("peak_bytes") is not None and length is not None:
            case = re.sub(rf"\b(s{length}|{length} tokens,) ", "", record["case"])
            series.setdefault((case, name_of(record)), {})[length] = record["peak_bytes"]
    lines = []
    for (case, name), peaks in series.items():
        if len(peaks) >= 3:
            square, linear, _ = parabola(peaks)
            lengths = ", ".join(str(length) for length in sorted(peaks))
            lines.append(f"| {case} | `{name}` | {lengths} | {linear / 1024:.1f} | {square + 0.0:z.2f} |")
    head = [
        "| case | arm or backend | lengths | KiB per token | bytes per token² |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    return "\n".join(head + lines) if lines else ""


def parabola(peaks: dict[int, int]) -> tuple[float, float, float]:
    """``a, b, c`` of ``bytes = a·n² + b·n + c``, least squares."""
    import numpy

    scale = 1024.0  # keeps the powers of n of one size
    square, linear, rest = numpy.polyfit([n / scale for n in peaks], list(peaks.values()), 2)
    return float(square) / scale**2, float(linear) / scale, float(rest)


def name_of(record: Record) -> str:
    """What was measured: the arm of a whole model, or the backend."""
    return str(record.get("arm") or record["backend"])


def _ratio(record: Record | None) -> str:
    return "–" if record is None or "ratio_to_sdpa" not in record else f"{record['ratio_to_sdpa']:.2f}"
