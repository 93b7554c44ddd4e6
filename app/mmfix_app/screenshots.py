"""Screenshots of the running app: ``python -m mmfix_app.screenshots --out docs/images``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmfix_app.browser import browser, compare
from mmfix_app.cli import launch

PICTURE = 3
"""The gallery's picture that is shown; the method and its parameters are the app's defaults."""


SHOTS = (("light", 1280, 860, ""), ("dark", 1280, 860, "-dark"), ("light", 390, 844, "-phone"))
"""Colour scheme, width and height of the window, ending of the file's name."""


def shoot(address: str, out: Path) -> list[Path]:
    """Take every screenshot; the files."""
    out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []

    def save(page: Any, name: str, whole: bool = False) -> None:
        files.append(out / f"demo-{name}.png")
        page.wait_for_timeout(600)
        page.screenshot(path=str(files[-1]), full_page=whole)

    with browser() as chrome:
        for scheme, width, height, suffix in SHOTS:
            page = chrome.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(address)
            page.wait_for_selector("#run")
            compare(page, PICTURE)
            page.evaluate("window.scrollTo(0, 0)")
            if suffix == "-phone":
                page.evaluate("document.querySelector('#stage').scrollIntoView({block: 'start'})")
            save(page, f"compare{suffix}", whole=not suffix)
            if not suffix:
                _tabs(page, save)
            page.close()
    return files


def _tabs(page: Any, save: Any) -> None:
    page.get_by_role("tab", name="Heads").click()
    page.locator("#map-heads").click()
    page.wait_for_selector("#heads .head", timeout=60_000)
    page.locator('.measure[data-name="vhd"]').click()
    save(page, "heads")
    page.get_by_role("tab", name="Method lab").click()
    page.locator("#sweep").click()
    page.wait_for_selector("#lab .chart", timeout=60_000)
    page.wait_for_function("document.querySelectorAll('#lab tbody tr').length >= 12", timeout=90_000)
    save(page, "lab")
    page.get_by_role("tab", name="Leaderboard").click()
    save(page, "leaderboard")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--url", help="a running app; one is started by default")
    given = parser.parse_args()
    demo, address = (None, given.url) if given.url else launch(block=False, quiet=True)
    try:
        for path in shoot(address, given.out):
            print(path)
    finally:
        if demo is not None:
            demo.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
