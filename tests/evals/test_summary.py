"""The page of all methods says what lies beyond chance, and on which side."""

from __future__ import annotations

from typing import Any

from mmfix_evals import summary


def record(difference: float, p: float, fired: float = 0.5) -> dict[str, Any]:
    key = {"task": "tinyworld-chair", "split": "test", "metric": "chair_i"}
    return {
        "config": {"model": "tiny", "split": "test"},
        "bootstrap": {"resamples": 10, "seed": 0},
        "tasks": {"tinyworld-chair": {"n_images": 7, "n_documents": 7}},
        "methods": [{"name": "greedy", "spec": []}, {"name": "vhr", "spec": [{"name": "vhr"}]}],
        "metrics": [{**key, "method": m, "value": 0.3} for m in ("greedy", "vhr")],
        "comparisons": [{**key, "method": "vhr", "difference": difference, "p_holm": p}],
        "speed": [
            {"task": "tinyworld-chair", "method": "vhr", "fired_share": fired, "relative_speed": 0.5,
             "passes_per_token": 1.0}
        ],
        "left_out": {"icd": "no instruction"},
    }  # fmt: skip


def row(*args: float) -> str:
    lines = summary.page(record(*args), "somewhere").splitlines()
    (found,) = [line for line in lines if line.startswith("| [vhr](methods/vhr.md) |")]
    return found


def test_a_difference_counts_when_it_is_beyond_chance() -> None:
    assert "-5.0*" in row(-0.05, 0.01)
    assert row(-0.05, 0.01).endswith("| 1 | 0.50x | better: CHAIR_i |")
    assert row(0.05, 0.01).endswith("worse: CHAIR_i |")
    assert row(-0.05, 0.2).endswith("| nothing |")
    assert "*" not in row(-0.05, 0.2)


def test_a_method_that_does_nothing_is_said_to() -> None:
    assert row(0.0, 1.0, 0.0).endswith("| nothing (it never fired) |")
    assert row(0.0, 1.0, 0.004).endswith("| nothing (it hardly fired) |")


def test_what_was_left_out_and_where_it_comes_from() -> None:
    text = summary.page(record(0.0, 1.0), "somewhere", "| equal |")
    assert "Generated from `somewhere`" in text
    assert "- `icd`: no instruction." in text
    assert text.endswith("## CHAIR at equal length\n\n| equal |\n")
    assert "| greedy |" in text
