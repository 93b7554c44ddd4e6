"""A Chromium that talks to nobody but the app, for screenshots, measurements and tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmfix_app import gallery

QUIET = (
    "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--disable-dev-shm-usage", "--disable-extensions",
)  # fmt: skip


def chromium() -> str | None:
    """Path of an installed Chromium, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def browser(**options: Any) -> Iterator[Any]:
    """A running browser.

    Raises:
        RuntimeError: no Chromium, or no playwright, with the command that installs it.
    """
    import os

    path = chromium()
    if path is None:
        raise RuntimeError("no Chromium found; install one, such as: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise RuntimeError("playwright is not installed; run: pip install playwright") from error
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=[*QUIET, *sandbox], **options)
        try:
            yield found
        finally:
            found.close()


def compare(page: Any, index: int | None = None, timeout: float = 120_000) -> None:
    """Choose a picture of the gallery, press Compare, wait for both answers."""
    if index is not None:
        page.locator("#gallery .thumb").nth(index).click()
        name = gallery.pictures()[index].name
        page.wait_for_selector(f'#picture img[src*="{name}"]', timeout=timeout)
    page.evaluate("document.querySelector('#stage .stage').dataset.old = 1")
    page.locator("#run").click()
    page.wait_for_selector('#stage .stage[data-state="done"]:not([data-old])', timeout=timeout)
