"""Reports: what stands on the page, that it needs nothing from outside, and that texts stay texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fake_eval
import pytest
from typer.testing import CliRunner

from mmfix_evals import report
from mmfix_evals.cli.app import app
from mmfix_evals.compare import Comparison
from mmfix_evals.errors import DataError
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.report import drawing, measures, plots
from mmfix_evals.report.browser import groups, marked
from mmfix_evals.report.latex import differences, escape
from mmfix_evals.run import run

pytestmark = pytest.mark.usefixtures("fake_tasks")

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

ATTACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked=1'> {{ 7 * 7 }}"
CHROMIUM = Path("/usr/bin/chromium")


@dataclass
class Hostile(fake_eval.FakeDecoder):
    """Says something different with a method, and something that a browser must not take for markup."""

    def with_method(self, method: Any) -> Hostile:
        return Hostile(self.model_id, tuple(method or ()), self.calls, self.before, self.fires)

    def _answer(self, content: str, prompt: str) -> fake_eval.FakeAnswer:
        answer = super()._answer(content, prompt)
        if not prompt.startswith("Is there"):
            answer.text = f"{answer.text} {ATTACK}"
        return answer


def make(folder: Path, methods: tuple[str, ...] = ("greedy", "var", "vhr:alpha=3")) -> Path:
    config = RunConfig("<b>model</b>", ("fake-pope", "fake-chair"), methods, folder, limit=8, resamples=30)
    run(config, ["mmfix", "eval", "run", "--model", "<b>"], Reporter(quiet=True), lambda _: Hostile())
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows):
        if row["task"] == "fake-pope":
            row["confidence"] = (n % 10 + 0.5) / 10
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        fake_eval.register(patch, fake_eval.FakePope(), fake_eval.FakeChair())
        yield make(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return report.html(report.read([folder]), title="A <report>")


class Elements(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    assert not re.search(r"https?://|//[a-z]+\.", page)
    for tag, attributes in Elements(page).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/jpeg;base64,")), (tag, value)
    assert "default-src 'none'" in page


def test_texts_stay_texts(page: str) -> None:
    elements = Elements(page)
    assert sum(tag == "script" for tag, _ in elements.tags) == 1  # the page's own
    assert not [tag for tag, attributes in elements.tags if any(name.startswith("on") for name in attributes)]
    assert ATTACK in elements.text
    assert "A <report>" in elements.text
    assert "--model <b>" in elements.text


def test_every_number_of_the_run_stands_on_the_page_with_its_interval(folder: Path, page: str) -> None:
    text = " ".join(Elements(page).text.split())
    results = json.loads((folder / "results.json").read_text())
    for entry in results["metrics"]:
        if entry["metric"] in ("accuracy", "chair_i", "recall"):
            low, value, high = (f"{100 * entry[name]:.1f}" for name in ("ci_low", "value", "ci_high"))
            assert value in text
            assert f"[{low}, {high}]" in text
    assert results["tasks"]["fake-pope"]["data"]["documents_sha256"][:16] in text


def test_every_plot_is_there(page: str) -> None:
    headings = re.findall(r"<h3>([^<]*)</h3><svg", page)
    assert headings == [
        "fake-pope: accuracy against speed",
        "fake-chair: chair_s against speed",
        "fake-pope: share of yes answers",
        "fake-chair: hallucination against recall and length",
        "fake-pope: what is hallucinated",
        "fake-chair: what is hallucinated",
        "fake-pope: reliability of answers",
        "fake-pope: what became of the answers",
    ]
    assert page.count("<svg") == page.count("</svg>") == len(headings)
    assert "vhr:alpha=3" in page[page.index("<svg") : page.index("</svg>")]


def test_wins_and_losses_come_first_and_are_counted(folder: Path) -> None:
    runs = report.read([folder])
    for group in groups(runs):
        answers = runs[0].answers[group.task]
        outcomes = [pair.outcome for pair in group.pairs]
        ranks = [("win", "loss", "changed", "same").index(outcome) // 2 for outcome in outcomes]
        assert ranks == sorted(ranks)
        total = sum(len(found) for found in answers.by_method[group.method].values())
        assert group.wins + group.losses + group.changed + group.same == total
        if group.wins and group.losses:
            assert set(outcomes[:2]) == {"win", "loss"}
        for pair in group.pairs:
            assert (pair.change < 0) == (pair.outcome == "win")
            assert (pair.change > 0) == (pair.outcome == "loss")
            if group.task == "fake-chair":
                wrong = [sum(piece.kind == "wrong" for piece in side) for side in (pair.after, pair.before)]
                assert wrong[0] - wrong[1] == pair.change
    assert {group.method for group in groups(runs)} == {"var", "vhr:alpha=3"}


def test_hallucinated_objects_are_marked() -> None:
    text = "A cat and a dog."
    mentions = [{"node": "dog", "start": 12, "end": 15, "hallucinated": True},
                {"node": "cat", "start": 2, "end": 5, "hallucinated": False}]  # fmt: skip
    assert [(piece.text, piece.kind) for piece in marked(text, mentions)] == [
        ("A ", ""), ("cat", "right"), (" and a ", ""), ("dog", "wrong"), (".", "")
    ]  # fmt: skip
    assert "".join(piece.text for piece in marked(text, [{**mentions[0], "end": 99}])) == text


def test_reliability_by_hand(folder: Path) -> None:
    run_ = report.read([folder])[0]
    samples = list(measures.samples_of(run_.answers["fake-pope"], "greedy"))
    bins = measures.reliability(run_, "fake-pope", "greedy")
    assert sum(one.n for one in bins) == len(samples)
    for one in bins:
        mine = [s for s in samples if abs(s["confidence"] - one.confidence) < 0.01]
        right = sum(s["verdicts"]["official"] == s["label"] for s in mine)
        assert (one.n, one.accuracy) == (len(mine), pytest.approx(right / len(mine)))
    expected = sum(one.n * abs(one.accuracy - one.confidence) for one in bins) / len(samples)
    assert measures.calibration_error(bins) == pytest.approx(expected)
    states = measures.answer_states(run_, "fake-pope", "greedy")
    vague = sum(s["response"] == "I cannot say" for s in samples) / len(samples)
    assert states["no verdict"] == pytest.approx(vague)
    assert sum(states.values()) == pytest.approx(1.0)


def test_two_runs_are_told_apart_and_results_alone_will_do(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a/run", ("greedy", "var")), make(tmp_path / "b/run", ("greedy",))
    (b / "samples.jsonl").unlink()
    runs = report.read([a, b])
    assert [one.label for one in runs] == ["run", "b/run"]
    page = report.html(runs, pictures=False)
    assert "greedy (b/run)" in page
    assert "data:image" not in page
    with pytest.raises(DataError, match="no such run folder"):
        report.read([tmp_path / "c"])


def test_latex_holds_the_same_values(folder: Path) -> None:
    assert escape("a_b & 5% {x} \\ <y>") == r"a\_b \& 5\% \{x\} \textbackslash{} \textless{}y\textgreater{}"
    text = report.latex(report.read([folder]))
    results = json.loads((folder / "results.json").read_text())
    for entry in results["metrics"]:
        if entry["metric"] == "accuracy":
            low, value, high = (f"{100 * entry[name]:.1f}" for name in ("ci_low", "value", "ci_high"))
            assert rf"{value} {{\scriptsize [{low}, {high}]}}" in text
    places = {(entry["task"], entry["split"]) for entry in results["comparisons"]}
    matched = {(entry["task"], entry["split"]) for entry in results["length_matched"]}
    assert places
    tables = 5 + len(places) + len(matched)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == tables
    for entry in results["comparisons"]:
        if entry["metric"] == "accuracy":
            cells = tuple(f"{100 * entry[name]:+.1f}" for name in ("difference", "ci_low", "ci_high"))
            shown = tuple(cell.replace("+0.0", "0.0").replace("-0.0", "0.0") for cell in cells)
            assert f"accuracy & {entry['method']} & {shown[0]} & [{shown[1]}, {shown[2]}] & " in text
    assert r"\textless{}b\textgreater{}model" in text
    for line in text.splitlines():
        if line.endswith(r"\\"):
            columns = text[: text.index(line)].rpartition(r"\begin{tabular}{")[2].split("}")[0]
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1


def test_a_comparison_is_printed_as_latex(folder: Path) -> None:
    def printed(*words: str) -> str:
        done = CliRunner().invoke(app, ["eval", "compare", str(folder), "--latex", *words], catch_exceptions=False)
        return str(done.stdout)

    whole = printed()
    assert whole.startswith(r"\begin{table}")
    assert r"only base & only method & McNemar p \\" in whole
    assert whole.strip() in report.latex(report.read([folder]))


def test_captions_of_equal_length_are_a_latex_table() -> None:
    entry = {
        "task": "tinyworld-chair", "split": "test", "metric": "chair_i", "method": "a_b", "baseline": "greedy", "n": 9,
        "value": 0.25, "baseline_value": 0.5, "difference": -0.25, "ci_low": -0.5, "ci_high": -0.125, "p": 0.01,
        "p_holm": 0.02, "uncut_difference": -0.125, "n_cut": 3, "baseline_n_cut": 4, "n_images": 9,
    }  # fmt: skip
    text = differences(Comparison([entry], matched=True))
    assert r"chair\_i & a\_b & 50.0 & 25.0 & -25.0 & [-50.0, -12.5] & 0.010 & 0.020 & -12.5 \\" in text
    assert r"\begin{tabular}{llrrrrrrr}" in text
    assert "Captions of equal length: " in text
    assert r"Cut, of 9 captions: a\_b 3 (its baseline 4)" in text


def test_a_legend_of_many_methods_takes_no_room_from_the_plot() -> None:
    def drawn(methods: int) -> tuple[float, str]:
        figure, (axis,) = drawing.panels_of(1)
        for n in range(methods):
            look = drawing.COLOURS[n % len(drawing.COLOURS)]
            drawing.point(axis, look, f"method:with=a-long-parameter-{n}", (1 + n, None, None), (n, None, None))
        text = drawing.svg_of(figure)
        figure.draw_without_rendering()
        return axis.get_window_extent().height, text

    few, many = drawn(4), drawn(40)
    assert many[0] >= 0.8 * few[0]
    assert many[1].count("method:with=a-long-parame…") == 40


def test_many_methods_share_a_plot_of_yes_answers_by_rows(folder: Path) -> None:
    (run,) = report.read([folder])
    entries = [e for e in run.results["metrics"] if e["metric"] == "yes_ratio" and e["method"] == "greedy"]
    more = [{**entry, "method": f"method-{n}"} for entry in entries for n in range(12)]
    many = report.Reported("r", {**run.results, "metrics": more}, {})
    (plot,) = plots.yes_ratio([many])
    assert all(f">method-{n}<" in plot.svg for n in range(12))
    (few,) = plots.yes_ratio([run])
    height = [float(re.search(r'height="([\d.]+)pt"', one.svg).group(1)) for one in (plot, few)]  # type: ignore[union-attr]
    assert height[0] > height[1]
    assert "ytick_12" in plot.svg  # a row per method


def test_the_model_index_is_what_the_hub_reads(folder: Path) -> None:
    yaml = pytest.importorskip("yaml")
    hub = pytest.importorskip("huggingface_hub.repocard_data")
    found = yaml.safe_load(report.model_index(report.read([folder])))["model-index"]
    assert [one["name"] for one in found] == [
        "<b>model</b>", "<b>model</b> with mmfix var", "<b>model</b> with mmfix vhr:alpha=3"
    ]  # fmt: skip
    _, read = hub.model_index_to_eval_results(found[:1])
    results = json.loads((folder / "results.json").read_text())
    values = {(e["task"], e["split"], e["metric"]): e for e in results["metrics"] if e["method"] == "greedy"}
    assert read
    for one in read:
        entry = values[one.dataset_type, one.dataset_split, one.metric_type]
        assert one.metric_value == entry["value"]
        assert one.metric_args["ci_low"] == entry["ci_low"]
        assert one.dataset_revision == results["tasks"][one.dataset_type]["data"]["documents_sha256"]


def test_the_command_writes_what_is_asked_for(folder: Path, tmp_path: Path) -> None:
    names = {"--html": "r.html", "--markdown": "r.md", "--latex": "r.tex", "--model-index": "r.yaml"}
    words = [word for option, name in names.items() for word in (option, str(tmp_path / name))]
    done = CliRunner().invoke(app, ["eval", "report", str(folder), *words], catch_exceptions=False)
    assert done.stdout.splitlines() == [f"written to {tmp_path / name}" for name in names.values()]
    starts = {"r.html": "<!doctype html>", "r.md": "**fake-pope", "r.tex": "% needs", "r.yaml": "model-index:"}
    for name, start in starts.items():
        assert (tmp_path / name).read_text().startswith(start)
    printed = CliRunner().invoke(app, ["eval", "report", str(folder), "--format", "latex"], catch_exceptions=False)
    assert printed.stdout.strip() == (tmp_path / "r.tex").read_text().strip()


def sorted_by_keyboard(view: Any) -> None:
    """A column's title, pressed three times, sorts each block of methods down, up, and back."""

    def methods() -> list[str]:
        found: list[str] = view.locator("#numbers .block >> nth=0 >> td:nth-child(2)").all_text_contents()
        return found

    def seen() -> list[str]:
        return [text for text in view.locator("#numbers .block >> nth=0 >> td:first-child").all_inner_texts() if text]

    def values() -> list[float]:
        return [float(v) for v in view.locator("#numbers .block >> nth=0 >> td:nth-child(3)").all_text_contents()]

    view.set_viewport_size({"width": 500, "height": 400})
    table = view.locator("#numbers .scroll").first
    asked, button = methods(), table.locator("th:nth-child(3) button")
    button.focus()
    orders = []
    for turn in ("descending", "ascending", None):
        view.keyboard.press("Enter")
        assert table.locator("th:nth-child(3)").get_attribute("aria-sort") == turn
        orders.append((methods(), values()))
        assert seen() == ["accuracy"], "the metric's name does not stand in the first row"
    (down, falling), (up, rising), (back, _) = orders
    assert falling == sorted(falling, reverse=True) != rising == sorted(rising)
    assert back == asked
    assert set(down) == set(up) == set(asked)
    table.locator("th:nth-child(2) button").press("Space")
    assert methods() == sorted(asked)
    p = table.locator(".block td:nth-child(7)")
    p.evaluate_all("cells => ['-', '<0.001', '0.040'].forEach((text, n) => (cells[n].textContent = text))")
    table.locator("th:nth-child(7) button").press("Space")
    assert [p.nth(n).text_content() for n in range(3)] == ["0.040", "<0.001", "-"]
    table.evaluate("box => { box.style.maxHeight = '150px'; box.scrollTo(200, 60); }")
    box, head, name = (
        one.bounding_box() for one in (table, table.locator("th").first, table.locator(".block td:nth-child(2)").first)
    )
    assert abs(head["y"] - box["y"]) < 2, "the table's head scrolls away"
    assert abs(name["x"] - box["x"]) < 2, "the methods' names scroll away"
    assert name["width"] < 0.5 * box["width"], "the methods' names leave no room for the numbers"
    view.reload()
    view.set_viewport_size({"width": 1200, "height": 900})


def test_in_a_browser(page: str, tmp_path: Path) -> None:
    """Nothing is fetched, nothing runs that should not, the filters work, and there is something to see."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is not here")
    from PIL import Image

    path = tmp_path / "report.html"
    path.write_text(page)
    with playwright.sync_playwright() as start:
        browser = start.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        view = browser.new_page(viewport={"width": 1200, "height": 900})
        requests, problems = [], []
        view.on("request", lambda request: requests.append(request.url))
        view.on("pageerror", lambda problem: problems.append(str(problem)))
        view.on("console", lambda message: problems.append(message.text))
        view.goto(path.as_uri())
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
        assert problems == []
        assert view.evaluate("window.hacked") is None
        sorted_by_keyboard(view)
        assert ATTACK in view.inner_text(".pair[data-task=fake-chair] p")
        total = view.locator(".pair:visible").count()
        view.select_option("[data-filter=outcome]", "win")
        wins = view.locator(".pair:visible").count()
        assert 0 < wins < total
        assert view.locator(".pair.win:visible").count() == wins
        assert view.inner_text("#count") == f"{wins} of {total} shown"
        view.fill("[data-filter=text]", "no such word")
        assert view.locator(".pair:visible").count() == 0
        assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        view.screenshot(path=str(tmp_path / "top.png"))
        boxes = [view.locator(".plots svg").nth(n).bounding_box() for n in range(view.locator(".plots svg").count())]
        browser.close()
    assert all(box["width"] > 200 and box["height"] > 80 for box in boxes)
    colours = Image.open(tmp_path / "top.png").convert("RGB").getcolors(1 << 24)
    assert len(colours) > 50
