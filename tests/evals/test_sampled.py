"""The cut alone stands between sampling and every contrast."""

from __future__ import annotations

from typing import Any

import mmfix
from mmfix_evals import sampled

KEY = {"task": "tinyworld-chair", "split": "test", "metric": "chair_i"}


def change(method: str, difference: float, p: float) -> dict[str, Any]:
    return {**KEY, "method": method, "difference": difference, "ci_low": -0.2, "ci_high": 0.1, "p_holm": p}


def value(method: str, mean: float) -> dict[str, Any]:
    return {**KEY, "method": method, "value": mean, "ci_low": 0.2, "ci_high": 0.4}


RECORD: dict[str, Any] = {
    "tasks": {"tinyworld-chair": {"n_images": 7, "generation": {"do_sample": True, "temperature": 1.0, "top_k": 0}}},
    "bootstrap": {"resamples": 10, "seed": 0},
    "methods": [{"name": n, "spec": [] if n == "greedy" else [{"name": n}]} for n in ("greedy", "plausibility", "vcd")],
    "metrics": [value("greedy", 0.5), value("plausibility", 0.4), value("vcd", 0.3)],
    "comparisons": [change("plausibility", -0.1, 0.01), change("vcd", -0.2, 0.01)],
}
AGAINST = {"comparisons": [change("greedy", 0.1, 0.01), change("vcd", -0.02, 0.9)]}


def test_a_contrast_is_compared_with_the_cut_and_the_cut_with_sampling() -> None:
    text = sampled.section(RECORD, AGAINST, "somewhere")
    assert "| sampling | | 50.0 |" in text
    assert "| plausibility | sampling | -10.0* |" in text
    assert "| vcd | the cut alone | -2.0 |" in text
    assert "`somewhere`" in text
    assert "temperature 1, no other cut, 7 images (tinyworld-chair)" in text


def test_a_page_says_what_the_cut_did_alone() -> None:
    def page(name: str) -> str:
        return sampled.paragraph(mmfix.methods()[name], RECORD, AGAINST, "somewhere")

    row = "| CHAIR_i ↓ | 50.0 [20.0, 40.0] | -10.0 [-20.0, +10.0] | 0.01 |"
    assert f"{row} -2.0 [-20.0, +10.0] | 0.9 |" in page("vcd")
    assert "`vcd` against the cut" in page("vcd")
    assert row in page("plausibility").splitlines()
    assert row in page("agla").splitlines(), "a contrast that was not sampled has the control on its page"
    assert "|" not in page("var")
