"""Colours, controls, code, charts, boards: the parts of the page without a browser."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

import mmfix
from mmfix import Method, param
from mmfix.errors import MethodError, UsageError
from mmfix_app import charts, code, controls, gallery, heads, lab, leaderboard, objects, stage
from mmfix_app.markup import where
from mmfix_app.service import Decoding, Run, Service
from mmfix_decoding.grids import PatchGrid, patch_grids, raster
from mmfix_evals.errors import DataError

SCENE = gallery.pictures()[3]
PROMPT = "Please describe this image in detail."


@pytest.fixture(scope="module")
def finished(service: Service) -> Run:
    return list(service.run(service.request(SCENE.image, PROMPT, "vhr", {}, Decoding(40))))[-1]


# -- colours ------------------------------------------------------------------------------------------------------


def test_objects_are_judged_only_where_contents_are_known() -> None:
    text = "a dog and two persons near a traffic light"
    assert [(o.name, text[o.start : o.end], o.verdict) for o in objects.named(text, {"dog"})] == [
        ("dog", "dog", "supported"), ("person", "persons", "contradicted"),
        ("traffic light", "traffic light", "contradicted"),
    ]  # fmt: skip
    assert {o.verdict for o in objects.named(text, None)} == {"unknown"}
    assert {o.verdict for o in objects.named(text, ())} == {"contradicted"}  # known to be empty is not unknown


def test_contents_are_known_by_pixels_alone() -> None:
    assert gallery.known(SCENE.image.copy()) is SCENE
    other = SCENE.image.copy()
    other.putpixel((0, 0), (1, 2, 3))
    assert gallery.known(other) is None


def test_an_unknown_picture_is_never_judged(finished: Run) -> None:
    other = SCENE.image.resize((97, 97))
    request = SimpleNamespace(**{**vars(finished.request), "image": other, "contents": None})
    page = stage.render(Run(request, finished.plain, finished.method, "done", finished.report))
    assert "contradicted" not in page
    assert "supported" not in page
    assert "not in the picture" not in page
    assert "nothing is marked right or wrong" in page


def test_heads_are_shown_as_they_are_read() -> None:
    for name, pairs in (("retrieval-heads", ((3, 2),)), ("act", ((2, 1), (3, 4))), ("vseam", ((1, 2, -0.25),))):
        chosen = mmfix.method(name, heads=pairs)
        (control,) = (one for one in controls.of(chosen) if one.name == "heads")
        assert controls.read(control, control.value) == pairs
        for wrong in ("heads.json", "/etc/passwd", "[(1, True)]", "[[1, 2]]"):  # no file of the server is ever read
            with pytest.raises(MethodError, match="whole numbers"):
                controls.read(control, wrong)


def test_the_stage_says_what_changed(finished: Run) -> None:
    page = stage.render(finished)
    wrong = objects.by_verdict(finished.text("plain"), SCENE.contents)["contradicted"]
    right = objects.by_verdict(finished.text("method"), SCENE.contents)["contradicted"]
    gone = [name for name in wrong if name not in right]
    assert gone, "the picture was chosen because something goes"
    for name in gone:
        assert f"no longer names {gallery.listed(gone)}" in stage.verdict(finished), name
    assert page.count('class="tok contradicted"') >= len(wrong)
    assert f"{len(wrong)} objects not in the picture" in page


def test_a_method_that_never_fires_is_said_to(service: Service) -> None:
    run = list(service.run(service.request(SCENE.image, PROMPT, "var", {"move": 0.0}, Decoding(8))))[-1]
    assert "never fired" in stage.verdict(run)
    assert run.text("plain") == run.text("method")


def test_every_token_has_a_map_of_the_patches(finished: Run) -> None:
    for token in (*finished.plain, *finished.method):
        assert token.weights is not None
        assert token.weights.shape == (8, 8)
        assert token.weights.sum() == pytest.approx(token.share, abs=1e-4)
        assert sum(token.masses.values()) == pytest.approx(1.0, abs=1e-5)


# -- controls -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape(Method):
    """A method with a field of every kind."""

    strength: float = param(0.5, "how much", 0.0, 2.0)
    count: int = param(3, "how many", 1, 9)
    on: bool = param(True, "whether")
    way: Literal["a", "b"] = param("a", "which")
    maybe: Literal["x", "y"] | None = param(None, "which or none")
    layers: tuple[int, ...] | None = param(None, "layers")
    role: str | None = param(None, "a text", example="You are tired.")
    factor: float | None = param(None, "a number or none", 0.0, 2.0)
    file: str | None = param(None, "a file's name")
    bare: float = 1.0


def shape() -> Method:
    params = {f.name: mmfix.Param(f.default, **f.metadata) for f in dataclasses.fields(Shape)}
    Shape.info = mmfix.MethodInfo("shape", "Shape", "none", "mask", 1, False, params, Shape)
    return Shape()


def test_controls_follow_the_fields_of_any_method() -> None:
    found = {c.name: c for c in controls.of(shape())}
    kinds = {name: c.kind for name, c in found.items()}
    assert kinds == {
        "strength": "number", "count": "whole", "on": "switch", "way": "choice", "maybe": "choice", "layers": "list",
        "role": "words", "factor": "optional", "bare": "number",
    }  # fmt: skip
    assert [controls.read(found["factor"], text) for text in ("", "1.5", None)] == [None, 1.5, None]
    for wrong in ("3", "nan", "many"):
        with pytest.raises(MethodError, match="from 0 to 2, or nothing"):
            controls.read(found["factor"], wrong)
    assert found["role"].value == "You are tired."
    assert controls.read(found["role"], " Be brief. ") == "Be brief."
    assert controls.read(found["role"], "") is None
    assert (found["strength"].low, found["strength"].high, found["strength"].help) == (0.0, 2.0, "how much")
    assert found["maybe"].choices == ("x", "y", "none")
    assert found["maybe"].value == "none"
    assert not found["bare"].slider
    assert [c.name for c in controls.sweepable(shape())] == ["strength", "count"]


@pytest.mark.parametrize("name", mmfix.methods())
def test_the_controls_of_every_method_give_the_method_back(service: Service, name: str) -> None:
    shown = controls.started(service.model, name)
    given = {c.name: c.value for c in controls.of(shown)}
    built, changed = controls.build(service.model, name, given)
    assert built == shown
    assert changed == {c.name: c.value for c in controls.of(shown) if c.kind == "words"}


@pytest.mark.usefixtures("registry")
def test_files_of_the_server_are_not_for_visitors(service: Service) -> None:
    mmfix.register("shape", title="Shape", paper="none", kind="mask")(Shape)
    with pytest.raises(MethodError, match="no parameter 'file'"):
        controls.build(service.model, "shape", {"file": "/etc/passwd"})


def test_what_was_changed_is_told_and_wrong_values_are_refused(service: Service) -> None:
    built, changed = controls.build(service.model, "vhr", {"alpha": 3, "layers": "1, 2", "drop_outliers": True})
    assert changed == {"alpha": 3.0, "layers": (1, 2)}
    assert built.layers == (1, 2)  # type: ignore[attr-defined]
    for field, value in {"alpha": 11, "layers": "one", "drop_outliers": 0, "scale_text_only": None}.items():
        if field in ("drop_outliers", "scale_text_only"):
            continue
        with pytest.raises(MethodError, match=field.replace("_", " ")):
            controls.build(service.model, "vhr", {field: value})
    for text in ("__import__('os')", "[1, 'a']", "1e9", "(" * 150, "9" * 300):
        with pytest.raises(MethodError, match="layers"):
            controls.build(service.model, "vhr", {"layers": text})


def test_where_a_map_is_lightest_is_said_in_words() -> None:
    said = {}
    for row, column in ((0, 0), (4, 4), (8, 7), (1, 5)):
        weights = np.full((9, 9), 0.01)
        weights[row, column] = 1.0
        said[row, column] = where(weights)
    assert said == {(0, 0): "upper left", (4, 4): "centre", (8, 7): "lower right", (1, 5): "upper middle"}
    assert where(np.ones((1, 2))) == "upper left"  # fewer patches than thirds


# -- copy as code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", [Decoding(12), Decoding(12, True, 1.3, 0.9, 7)], ids=["greedy", "sample"])
def test_the_copied_code_gives_the_shown_answer(
    service: Service, decoding: Decoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = 'Please describe "this" image in detail.'
    request = service.request(SCENE.image, prompt, "vhr", {"alpha": 3.0}, decoding)
    shown = list(service.run(request))[-1].text("method")
    given = ("tiny", "vhr", request.changed, prompt, decoding)
    monkeypatch.chdir(tmp_path)
    SCENE.image.save("picture.png")
    script, printed = code.python(*given), io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(script, {})
    assert printed.getvalue().strip() == shown
    assert "'vhr', alpha=3.0" in script

    from typer.testing import CliRunner

    from mmfix_evals.cli.app import app

    words = shlex.split(code.command(*given))
    assert words[0] == "mmfix"
    result = CliRunner().invoke(app, [*words[1:], "--json"])
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout[result.stdout.index("{") :])["answers"]
    assert [a["text"] for name, a in answers.items() if name != "plain"] == [shown]


# -- heads and lab ------------------------------------------------------------------------------------------------


def test_heads_are_measured_on_the_plain_model(service: Service, finished: Run) -> None:
    found = heads.measure(service.decoder, SCENE.image, PROMPT)
    assert found.mass.shape == found.divergence.shape == (6, 6)
    mean = np.mean([[found.maps[layer][head] for head in range(6)] for layer in range(6)], axis=(0, 1))
    assert np.allclose(mean, finished.plain[0].weights, atol=1e-5)
    assert (found.divergence > 0).all()
    page = heads.render(found, SCENE.image)
    assert page.count('class="head"') == 36
    assert page.count('data-first="1"') == 1


def test_the_probe_picks_the_heads_that_vhr_scales(service: Service) -> None:
    """VHD of the first reinforced layer is VHR's own: later ones differ, because earlier layers are scaled by then."""
    found = heads.measure(service.decoder, SCENE.image, PROMPT)
    scaled: dict[int, Any] = {}

    @dataclass(frozen=True, kw_only=True)
    class Spy(type(mmfix.method("vhr"))):  # type: ignore[misc]
        def head_scale(self, site: Any, heads: Any, text_only: Any) -> Any:
            edit = super().head_scale(site, heads, text_only)
            scaled.setdefault(site.layer, edit.scale[0])
            return edit

    list(service.decoder.with_method(Spy(drop_outliers=False)).stream(SCENE.image, PROMPT, max_new_tokens=1))
    layer = min(scaled)
    vhd = torch.from_numpy(found.divergence[layer])
    assert torch.equal(scaled[layer] != 1, vhd > vhd.quantile(0.5))


def test_a_sweep_moves_the_margin(service: Service) -> None:
    base = mmfix.calibrated(service.model, "vhr")
    control = controls.sweepable(base)[0]
    at = lab.values(control, 0.0, 4.0, 5)
    question = gallery.question("chair")
    found = list(lab.sweep(service.decoder, SCENE.image, question, base, control, at))[-1]
    assert [m.value for m in found] == [None, 0.0, 1.0, 2.0, 3.0, 4.0]
    one = found[2]
    assert one.margin == pytest.approx(found[0].margin, abs=1e-5)  # alpha 1 is the plain model
    assert one.mass == pytest.approx(found[0].mass, abs=1e-6)
    assert len({round(m.margin, 4) for m in found[1:]}) == 5
    answer = service.decoder.generate(SCENE.image, question, max_new_tokens=1).text.lower()
    assert (found[0].margin > 0) == answer.startswith("yes")
    page = lab.render(found, control, "VHR", question)
    assert page.count("<circle") == 10


def test_sweep_ranges_are_checked() -> None:
    strength, count = controls.sweepable(shape())
    assert lab.values(count, 1, 3, 11) == [1.0, 2.0, 3.0]
    for low, high in ((1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (0.0, 3.0)):
        with pytest.raises(UsageError, match="strength"):
            lab.values(strength, low, high, 5)


# -- patch grids --------------------------------------------------------------------------------------------------


def test_grids_of_tiled_models_come_from_the_processor() -> None:
    nothing = SimpleNamespace(image_processor=SimpleNamespace())
    model = SimpleNamespace(config=SimpleNamespace())
    assert patch_grids({}, 64, model, nothing, (96, 96)) == [PatchGrid(0, 8, 8)]
    assert patch_grids({}, 65, model, nothing, (96, 96)) == []
    merging = SimpleNamespace(image_processor=SimpleNamespace(merge_size=2))
    thw = {"image_grid_thw": torch.tensor([[1, 8, 12]])}
    assert patch_grids(thw, 24, model, merging, (120, 80)) == [PatchGrid(0, 4, 6)]
    size = SimpleNamespace(image_size=336, patch_size=14)
    pins = [[336, 672], [672, 336], [672, 672]]
    anyres = SimpleNamespace(config=SimpleNamespace(vision_config=size, image_grid_pinpoints=pins))
    wide = {"image_sizes": torch.tensor([[300, 600]])}
    assert patch_grids(wide, 576 + 24 * 49, anyres, nothing, (600, 300)) == [
        PatchGrid(0, 24, 24), PatchGrid(576, 24, 48, skip=1)
    ]  # fmt: skip
    cropped = SimpleNamespace(
        image_processor=SimpleNamespace(
            size={"shortest_edge": 336}, do_center_crop=True, crop_size={"height": 336, "width": 336}
        )
    )
    (grid,) = patch_grids({}, 576, model, cropped, (800, 400))
    assert grid.box == pytest.approx((0.25, 0.0, 0.75, 1.0))


def test_a_raster_keeps_mass_and_place() -> None:
    weights = np.arange(16.0)
    assert np.array_equal(raster(weights, [PatchGrid(0, 4, 4)]), weights.reshape(4, 4))
    right = raster(weights, [PatchGrid(0, 4, 4, box=(0.5, 0.0, 1.0, 1.0))])
    assert right is not None
    assert right.sum() == pytest.approx(weights.sum())
    assert right[:, :16].sum() == 0
    two = raster(np.ones(4 + 6), [PatchGrid(0, 2, 2), PatchGrid(4, 2, 2, skip=1)])
    assert two is not None
    assert two.sum() == pytest.approx(8.0)  # line breaks are nowhere in the picture


# -- leaderboard and charts ---------------------------------------------------------------------------------------


def test_the_board_shows_the_records_with_their_intervals() -> None:
    found = leaderboard.runs([])
    run = leaderboard.load(found["tinyworld"])
    for _, key in leaderboard.metrics(run):
        page = leaderboard.render(run, key)
        names = {m["method"] for m in run["metrics"]}
        assert page.count("<tr>") == 1 + len(names)
    page = leaderboard.render(run, "tinyworld-chair/test/chair_i")
    assert "lower is better" in page
    assert page.count('class="ci"') == len(names)
    entry = next(m for m in run["metrics"] if m["metric"] == "chair_i" and m["method"] == "greedy")
    assert f"{100 * entry['value']:.1f} [{100 * entry['ci_low']:.1f}, {100 * entry['ci_high']:.1f}]" in page


def test_the_board_says_where_greedy_is_sampled() -> None:
    run = copy.deepcopy(leaderboard.load(leaderboard.runs([])["tinyworld"]))
    key = "tinyworld-chair/test/chair_i"
    assert "drawn" not in leaderboard.render(run, key)
    run["tasks"]["tinyworld-chair"]["generation"]["do_sample"] = True
    assert "greedy is the plain model, sampled" in leaderboard.render(run, key)


def test_run_folders_are_added_and_broken_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_text("{}")
    found = leaderboard.runs([tmp_path])
    assert found["mine"] == tmp_path / "mine"
    with pytest.raises(DataError, match="schema version"):
        leaderboard.load(found["mine"])
    (tmp_path / "mine" / "results.json").write_text('{"schema_version": 1, "seconds": 3}')
    shown, refused = leaderboard.readable([tmp_path])
    assert "tinyworld" in shown
    assert "mine" not in shown
    assert [line for line in refused if line.startswith("mine: no metrics")]


def test_axes_are_never_empty() -> None:
    flat = charts.axis([2.0, 2.0], 0, 100)
    assert flat.low < 2.0 < flat.high
    assert len(flat.ticks()) >= 2
    assert charts.axis([0.0, 1.0], 0, 100).ticks() == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    said = charts.line("T <x>", [0, 1], [1, 2], "p", "q", 1.5, None)
    assert "T &lt;x&gt;" in said
    assert 'role="img"' in said


def test_names_of_many_points_cover_neither_one_another_nor_a_dot() -> None:
    points = [charts.Point(f"method-number-{n}", 1 + 0.01 * (n % 7), 30 + 0.2 * n, 29, 40, n == 20) for n in range(40)]
    page = charts.scatter("t", points, "x", "y")
    found = re.findall(r'class="name" x="([\d.]+)" y="([\d.]+)">([^<]+)<', page)
    assert 2 <= len(found) < 40
    assert "method-number-20" in {name for _, _, name in found}  # the baseline is named first
    assert f"{len(found)} of 40 named" in page
    assert page.count("<title>method-number-") == 40
    boxes = [(float(a), float(b), float(a) + charts.LETTER * len(name)) for a, b, name in found]
    for i, (start, level, end) in enumerate(boxes):
        assert charts.LEFT <= start < end <= charts.WIDTH
        assert charts.TOP <= level <= charts.HEIGHT
        assert not any(abs(level - b) < 12 and start < c and a < end for a, b, c in boxes[:i])
    few = charts.scatter("t", [charts.Point("a", 1, 1, None, None), charts.Point("b", 2, 2, None, None)], "x", "y")
    assert few.count('class="name"') == 2
    assert "named;" not in few
