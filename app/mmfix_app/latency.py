"""Time to first token with visitors at once: ``python -m mmfix_app.latency --out docs/demo-latency.json``.

Every visitor is a page of a real browser that presses Compare again and again; a time runs from the press to the first
token on the page, waiting in the queue included.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import gradio

import mmfix
from mmfix_app.browser import browser
from mmfix_app.cli import launch
from mmfix_evals import machine

VISITORS, ROUNDS = 4, 8

# Notes when the button is pressed and when the first word stands on the page.
_CLOCK = """() => {
  window.times = [];
  window.press = () => {
    const start = performance.now();
    document.querySelectorAll('#stage .tok').forEach((one) => one.dataset.old = 1);
    const seen = new MutationObserver(() => {
      if (!document.querySelector('#stage .answer .tok:not([data-old])')) return;
      seen.disconnect();
      window.times.push(performance.now() - start);
    });
    seen.observe(document.querySelector('#stage'), { childList: true, subtree: true });
    document.querySelector('#run').click();
  };
}"""


def measure(address: str, visitors: int = VISITORS, rounds: int = ROUNDS) -> list[float]:
    """Milliseconds to the first token, `visitors` × `rounds` of them."""
    with browser() as chrome:
        pages = [chrome.new_context().new_page() for _ in range(visitors)]
        for page in pages:
            page.set_default_timeout(180_000)
            page.goto(address)
            page.wait_for_selector("#run:not([disabled])")
            page.evaluate(_CLOCK)
        for done in range(rounds):
            for page in pages:
                page.wait_for_selector("#run:not([disabled])")
                page.evaluate("window.press()")
            for page in pages:
                page.wait_for_function(f"window.times.length > {done}")
                page.wait_for_selector('#stage .stage[data-state="done"]')
        return [float(ms) for page in pages for ms in page.evaluate("window.times")]


def record(times: list[float], visitors: int, model: str) -> dict[str, Any]:
    """The measurement with its conditions."""
    ordered = sorted(times)
    return {
        "what": "milliseconds from pressing Compare to the first token on the page, waiting in the queue included",
        "visitors": visitors,
        "n": len(times),
        "median_ms": round(statistics.median(times)),
        "p95_ms": round(ordered[max(0, -(-95 * len(ordered) // 100) - 1)]),
        "max_ms": round(ordered[-1]),
        "model": model,
        "method": "vhr",
        "machine": machine.describe(machine.machine()),
        "versions": {"mmfix": mmfix.__version__, "gradio": gradio.__version__},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/demo-latency.json"))
    parser.add_argument("--visitors", type=int, default=VISITORS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    demo, address = launch(block=False, quiet=True)
    try:
        found = record(measure(address, given.visitors, given.rounds), given.visitors, "tiny")
    finally:
        demo.close()
    given.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
