"""The generated page of a method: equations fenced, parameters listed, results beside the control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mmfix
from mmfix_evals import method_pages

DOC = """First line.

With ``l`` the logits, and :class:`mmfix.Mix`::

    z = l - l'

    cut

After it.

Args:
    alpha: strength; see
        the paper.
    low, high: ends.

Raises:
    MethodError: a value out of range.

Example:
    >>> run()
"""


def test_a_docstring_becomes_markdown() -> None:
    assert method_pages.body(DOC) == (
        "First line.\n\nWith `l` the logits, and `mmfix.Mix`:\n\n```text\nz = l - l'\n\ncut\n```\n\nAfter it.\n\n"
        "## Parameters\n\n- `alpha`: strength; see\n  the paper.\n- `low, high`: ends.\n\n"
        "## Errors\n\n- `MethodError`: a value out of range.\n\n## Example\n\n```python\n>>> run()\n```"
    )


def test_every_method_has_a_page_with_its_equation() -> None:
    found = method_pages.pages(None, "", {})
    for name, info in mmfix.methods().items():
        page = found[method_pages.FOLDER / f"{name}.md"]
        assert f"# {info.title}" in page
        assert info.paper.removeprefix("arXiv:") in page
        assert "```text" in page or "The equations and the parameters are those of" in page, f"{name}: no equation"
        assert all(f"| `{parameter}` |" in page for parameter in info.params)
        assert page.count("```") % 2 == 0


def record(method: str) -> dict[str, Any]:
    key = {"task": "tinyworld-chair", "split": "test", "metric": "chair_i"}
    arms = ("greedy", method, "plausibility")
    return {
        "metrics": [{**key, "method": m, "value": 0.3, "ci_low": 0.2, "ci_high": 0.4} for m in arms],
        "comparisons": [
            {**key, "method": m, "difference": d, "ci_low": -0.1, "ci_high": 0.1, "p_holm": p}
            for m, d, p in ((method, -0.05, 0.04), ("plausibility", 0.01, 1.0))
        ],
        "speed": [{"method": method, "fired_share": 0.002}],
        "methods": [{"name": m, "spec": [] if m == "greedy" else [{"name": m.partition(":")[0]}]} for m in arms],
        "left_out": {"icd": "no instruction"},
    }


def test_a_contrast_stands_beside_the_cut_alone() -> None:
    text = method_pages.results("vcd", mmfix.methods()["vcd"], record("vcd"), "somewhere")
    row = "| CHAIR_i ↓ | 30.0 [20.0, 40.0] | -5.0 [-10.0, +10.0] | 0.04 | +1.0 [-10.0, +10.0] | 1 |"
    assert row in text
    assert "these rows say nothing about it" in text


def test_a_method_measured_with_parameters_of_its_own() -> None:
    arm = "icd:instruction=Be confused."
    assert f"`{arm}` against greedy" in method_pages.results("icd", mmfix.methods()["icd"], record(arm), "somewhere")


def test_a_method_with_a_task_of_its_own_shows_the_record_of_that_task() -> None:
    own = record("lqcd")
    for entry in (*own["metrics"], *own["comparisons"]):
        entry |= {"task": "tinyworld-sycophancy", "split": "absent", "metric": "flip_rate"}
    found = method_pages.pages(record("vcd"), "somewhere", {}, {"lqcd": (own, "elsewhere")})
    page = found[method_pages.FOLDER / "lqcd.md"]
    assert "| flip rate ↓ (absent object claimed) | 30.0 [20.0, 40.0] | -5.0 [-10.0, +10.0] |" in page
    assert "`elsewhere`" in page
    assert "`somewhere`" in found[method_pages.FOLDER / "vcd.md"]


@pytest.mark.parametrize(("name", "said"), [("icd", "Not measured: no instruction."), ("lqcd", "Not measured.")])
def test_what_was_not_measured_is_said(name: str, said: str) -> None:
    assert method_pages.results(name, mmfix.methods()[name], record("vcd"), "") == said


def test_the_index_counts_families() -> None:
    index = method_pages.pages(None, "", {"vcd": "19 of 20"})[Path("docs/methods/README.md")]
    (row,) = [line for line in index.splitlines() if line.startswith("| `vcd`")]
    assert row.endswith("| contrast | 2 | no | 19 of 20 |")
