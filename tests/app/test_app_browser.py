"""The app in a real browser: what a visitor does, and four of them at once."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.paced import pace

from mmfix_app.browser import browser, chromium, compare

pytestmark = [
    pytest.mark.skipif(chromium() is None, reason="no Chromium is installed (apt-get install chromium)"),
    pytest.mark.xdist_group("app"),  # one server and one browser at a time
]
SLOW = 90_000


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with browser() as found:
        yield found


class Visitor:
    """A page that remembers errors of the console and requests to anyone but the app."""

    def __init__(self, chrome: Any, address: str, **options: Any) -> None:
        self.page = chrome.new_context(**options).new_page()
        self.page.set_default_timeout(SLOW)
        self.problems: list[str] = []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.problems.append(str(e)))
        self.page.on("request", lambda r: self._asked(r.url, address))
        self.page.goto(address)
        self.page.wait_for_selector("#run")

    def _asked(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.problems.append(f"asked {url}")


@pytest.fixture
def visitor(chrome: Any, served: tuple[Any, str]) -> Iterator[Visitor]:
    """Someone who has just opened the app: no test sees what another one chose."""
    found = Visitor(chrome, served[1], viewport={"width": 1280, "height": 900})
    yield found
    found.page.context.close()


@pytest.fixture
def page(visitor: Visitor) -> Iterator[Any]:
    yield visitor.page
    assert visitor.problems == []


def choose(page: Any, method: str) -> None:
    """Take a method from the list and open its controls."""
    page.locator("#method input").click()
    page.get_by_role("option", name=f"({method})").click()
    page.locator("#parameters button").first.click()


def words(page: Any, side: str) -> list[str]:
    found: list[str] = page.locator(f'.side[data-side="{side}"] .answer .tok').all_text_contents()
    return found


WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const count = (side) => document.querySelectorAll(`.side[data-side=${side}] .answer .tok`).length;
    window.seen.push([count("plain"), count("method")]);
  }).observe(document.querySelector("#stage"), { childList: true, subtree: true });
}"""


def test_both_answers_grow_and_a_token_shows_its_map(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pace(monkeypatch, pause=0.02)
    page.evaluate(WATCH)
    compare(page, 6)
    seen = [tuple(one) for one in page.evaluate("window.seen")]
    between = [one for one in seen if 0 < one[0] < seen[-1][0]]
    assert between, "the plain answer came at once"
    assert all(abs(a - b) <= 2 for a, b in between), "the answers do not come together"
    assert seen == sorted(seen) or sorted(seen)[-1][0] >= len(words(page, "plain"))
    assert "kite" in page.locator(".legend").inner_text()

    canvas = page.locator('.side[data-side="plain"] canvas')
    tokens = page.locator('.side[data-side="plain"] .answer .tok')
    shown = []
    for n in (0, 4):
        tokens.nth(n).click()
        shown.append(canvas.evaluate("c => [c.dataset.shown, c.toDataURL()]"))
        assert "of attention was on the picture" in page.locator('.side[data-side="plain"] .look').inner_text()
    assert shown[0] != shown[1]
    tokens.nth(4).press("ArrowRight")
    assert canvas.evaluate("c => c.dataset.shown") != shown[1][0]
    assert page.evaluate("document.activeElement.dataset.i") == tokens.nth(5).get_attribute("data-i")


def test_another_method_has_its_own_controls_and_code(page: Any) -> None:
    choose(page, "var")
    shown = page.locator("#parameters :visible")
    page.get_by_label("move", exact=False).and_(shown).first.wait_for()
    assert page.get_by_label("alpha", exact=False).and_(shown).count() == 0
    compare(page)
    assert "VAR never fired here" in page.locator(".verdict").first.inner_text()
    assert words(page, "plain") == words(page, "method")
    page.locator("#code button").first.click()
    page.locator("#code pre").first.wait_for()
    assert "mmfix.mitigate(model, 'var')" in page.locator("#code pre").first.inner_text()


def test_an_error_stands_at_its_control(page: Any) -> None:
    choose(page, "var")
    box = page.get_by_label("sink dims", exact=False).and_(page.locator(":visible")).first
    box.fill("one")
    page.locator("#run").click()
    page.locator("#method-error .mm-error").wait_for()
    assert "whole numbers with commas" in page.locator("#method-error").inner_text()
    box.fill("")
    page.locator("#method input").click()
    page.get_by_role("option", name="(vhr)").click()
    page.locator("#prompt-error").wait_for(state="hidden")


def bomb(path: Path) -> Path:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 90_001)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_broken_files_and_bombs_are_refused_in_words(page: Any, visitor: Visitor, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"nonsense" * 20)
    for path, said in ((broken, "broken"), (bomb(tmp_path / "bomb.png"), "30000 × 30000 pixels")):
        if page.locator('#picture input[type="file"]').count() == 0:
            page.locator('#picture button[aria-label="Clear"], #picture button[title="Clear"]').first.click()
        page.locator('#picture input[type="file"]').first.set_input_files(str(path))
        page.locator("#picture-error .mm-error", has_text=said).wait_for()
    prompt = page.get_by_label("Prompt")
    prompt.fill("")
    page.locator("#run").click()
    page.locator("#prompt-error .mm-error", has_text="empty").wait_for()
    assert "30000" in page.locator("#picture-error").inner_text()
    prompt.fill("Please describe this image in detail.")
    page.locator("#gallery .thumb").nth(3).click()
    page.locator("#picture-error .mm-error").wait_for(state="detached")
    visitor.problems[:] = [p for p in visitor.problems if "ERR_" not in p and "decode" not in p.lower()]


def test_heads_can_be_clicked(page: Any) -> None:
    page.get_by_role("tab", name="Heads").click()
    page.locator("#map-heads").click()
    page.locator("#heads .head").first.wait_for()
    assert page.locator("#heads .head").count() == 36
    before = page.locator("#heads canvas").evaluate("c => c.dataset.shown")
    page.locator('#heads .head[data-layer="0"][data-head="0"]').click()
    assert page.locator("#heads canvas").evaluate("c => c.dataset.shown") != before
    assert page.locator("#heads .look").inner_text().startswith("Layer 0, head 0")
    colour = "e => getComputedStyle(e).backgroundColor"
    first = page.locator("#heads .head").first
    mass = first.evaluate(colour)
    page.locator('.measure[data-name="vhd"]').click()
    assert first.evaluate(colour) != mass


def test_a_sweep_draws_its_charts(page: Any) -> None:
    page.get_by_role("tab", name="Method lab").click()
    page.locator("#sweep").click()
    page.wait_for_function("document.querySelectorAll('#lab tbody tr').length >= 11")
    assert page.locator("#lab svg.chart").count() == 2
    assert page.locator("#lab .verdict").inner_text()


def test_the_board_sorts(page: Any) -> None:
    page.get_by_role("tab", name="Leaderboard").click()
    column = page.locator("#board tbody td:nth-child(2)")
    page.locator("#board th button").nth(1).click()
    down = column.evaluate_all("cells => cells.map(c => +c.dataset.v)")
    page.locator("#board th button").nth(1).click()
    assert column.evaluate_all("cells => cells.map(c => +c.dataset.v)") == sorted(down) == down[::-1]


def test_stopping_in_mid_stream_frees_the_model(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as slowed:
        pace(slowed, halt=6)
        page.locator("#run").click()
        page.locator('#stage .stage[data-state="running"]').wait_for()
        page.locator('.side[data-side="plain"] .answer .tok').first.wait_for()
        page.locator("#stop").click()
        page.locator('#stage .stage[data-state="stopped"]').wait_for()
        shown = words(page, "plain")
    compare(page)
    whole = words(page, "plain")
    assert 0 < len(shown) < len(whole)
    assert whole[: len(shown)] == shown


def tab_to(page: Any, selector: str, most: int = 60) -> None:
    """Press Tab until what `selector` finds has the focus, which must be seen there."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            assert page.evaluate(FOCUS_SEEN), f"the focus is not seen on {selector}"
            return
    raise AssertionError(f"Tab never reaches {selector}")


FOCUS_SEEN = """() => { const style = getComputedStyle(document.activeElement);
  return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2; }"""


def test_the_keyboard_alone_is_enough(page: Any) -> None:
    """A picture, a prompt, a run, a word's map, another tab: nothing is clicked."""
    keys = page.keyboard
    tab_to(page, '#gallery .thumb[data-index="6"]')
    assert page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.title")
    keys.press("Enter")
    page.locator('#gallery .thumb[data-index="6"][aria-pressed="true"]').wait_for()
    assert page.locator('#gallery .thumb[aria-pressed="true"]').count() == 1
    tab_to(page, "textarea")
    keys.press("Control+A")
    keys.type("describe this image briefly .")
    tab_to(page, "#method input")
    keys.press("Escape")
    tab_to(page, "#run")
    keys.press("Enter")
    page.locator('#stage .stage[data-state="done"]').wait_for()
    tab_to(page, "#stage .answer .tok")
    canvas, look = (page.locator(f'.side[data-side="plain"] {one}') for one in ("canvas", ".look"))
    keys.press("Home")
    first = canvas.evaluate("c => c.dataset.shown")
    assert "most at the" in look.inner_text(), "where the light falls is not said in words"
    keys.press("ArrowRight")
    assert page.evaluate(FOCUS_SEEN)
    assert canvas.evaluate("c => c.dataset.shown") != first
    tab_to(page, "#code button")
    keys.press("Space")
    tab_to(page, "#code .copy")
    page.locator("#code pre", has_text="briefly").first.wait_for()
    tab_to(page, 'button[role="tab"]:nth-of-type(2)')
    keys.press("Enter")
    tab_to(page, "#map-heads")
    keys.press("Space")
    page.locator("#heads .head").first.wait_for()
    tab_to(page, "#heads .head")
    chosen = page.locator("#heads .look").inner_text()
    keys.press("ArrowLeft")
    assert page.locator("#heads .look").inner_text() != chosen


def test_phone_width_has_no_sideways_scroll(chrome: Any, served: tuple[Any, str]) -> None:
    one = Visitor(chrome, served[1], viewport={"width": 375, "height": 740}, color_scheme="dark")
    assert one.page.evaluate("document.documentElement.scrollWidth") <= 375
    assert one.page.evaluate("document.body.classList.contains('dark')")
    assert one.page.locator("img:not([alt])").count() == 0
    compare(one.page)
    one.page.locator("#code button").first.click()
    one.page.locator("#code pre").first.wait_for()
    assert one.page.evaluate("document.documentElement.scrollWidth") <= 375  # nor does a long line of code
    one.page.locator(".overflow-menu button").first.click()
    one.page.locator(".overflow-dropdown button", has_text="Leaderboard").click()
    one.page.locator(".board table").wait_for()
    assert one.page.evaluate("document.documentElement.scrollWidth") <= 375  # the table scrolls, the page does not
    one.page.locator(".theme").click()
    assert not one.page.evaluate("document.body.classList.contains('dark')")
    one.page.context.close()
    assert one.problems == []


def test_four_visitors_wait_in_one_line_and_all_are_served(chrome: Any, served: tuple[Any, str]) -> None:
    visitors = [Visitor(chrome, served[1]) for _ in range(4)]
    for one in visitors:
        one.page.evaluate(
            """() => { window.places = []; new MutationObserver(() => {
              const text = document.querySelector("#stage").innerText.match(/queue: *(\\d+)/i);
              if (text) window.places.push(+text[1]); }).observe(document.body, { childList: true, subtree: true,
              characterData: true }); }"""
        )
    for one in visitors:
        one.page.locator("#run").click(no_wait_after=True)
    for one in visitors:
        one.page.locator('#stage .stage[data-state="done"]').wait_for()
    places = [place for one in visitors for place in one.page.evaluate("window.places")]
    assert places, "nobody saw a place in the queue"
    texts = {" ".join(words(one.page, "method")) for one in visitors}
    assert len(texts) == 1  # the same request has the same answer, whoever waits
    for one in visitors:
        assert one.problems == []
        one.page.context.close()
