"""The page: tabs, controls and what happens when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

import mmfix
from mmfix.errors import MmfixError
from mmfix_app import code, controls, gallery, heads, lab, leaderboard, stage
from mmfix_app.api import Api
from mmfix_app.jobs import Jobs
from mmfix_app.markup import error, esc
from mmfix_app.pictures import open_upload
from mmfix_app.service import Decoding, Request, Service
from mmfix_evals.errors import EvalError

ASSETS = Path(__file__).parent / "assets"
PROMPT = "Please describe this image in detail."
PREFERRED = "vhr"
QUEUE = "model"
"""Everything that uses the model waits in one line."""


def picture_input(value: str | None = None, **options: Any) -> gr.Image:
    """An image box that hands over the file's path: nothing decodes a visitor's file before it is checked."""
    found = gr.Image(value, sources=["upload", "clipboard"], format="png", buttons=[], **options)
    found.preprocess = lambda payload: None if payload is None else payload.path
    return found


def script(name: str) -> str:
    return (ASSETS / f"{name}.js").read_text(encoding="utf-8")


def build(service: Service, model_id: str, run_folders: list[Path], *, mcp: bool = False) -> gr.Blocks:
    """The whole app."""
    with gr.Blocks(title="mmfix", analytics_enabled=False, delete_cache=(60, service.limits.keep_seconds)) as demo:
        _html(_header(model_id), js_on_load=script("header"))
        page = _Page(service, model_id)
        with gr.Tab("Compare"):
            page.compare()
        with gr.Tab("Heads"):
            page.heads()
        with gr.Tab("Method lab"):
            page.lab()
        with gr.Tab("Leaderboard"):
            _board(run_folders)
        Api(service, page.jobs).add(picture_input, QUEUE, mcp)
        demo.unload(page.jobs.leave)
    return demo


def _header(model_id: str) -> str:
    return (
        '<header class="mm-head"><h1>mmfix</h1><p>What does a vision-language model say that is not in the picture, '
        f'and what does a method in its attention change?</p><span class="chip">model: {esc(model_id)}</span>'
        '<button type="button" class="theme">Light / dark</button></header>'
    )


class _Page:
    """Components that several tabs share, and the events between them."""

    def __init__(self, service: Service, model_id: str) -> None:
        self.service = service
        self.model_id = model_id
        self.jobs = Jobs()
        self.methods = service.methods
        self.first = PREFERRED if PREFERRED in self.methods else self.methods[0]
        self.fields: list[tuple[str, controls.Control, Any]] = []

    # -- Compare --------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=290):
                self._picture()
                self.prompt = gr.Textbox(
                    PROMPT, label="Prompt", lines=2, max_lines=4, max_length=self.service.limits.prompt_characters
                )
                self.prompt_error = _slot("prompt-error")
                self._method()
                self._decoding()
                with gr.Row():
                    run = gr.Button("Compare", variant="primary", elem_id="run")
                    stop = gr.Button("Stop", elem_id="stop", interactive=False)
            with gr.Column(scale=7, min_width=320):
                self.stage = _html(stage.empty(), js_on_load=script("stage"), elem_id="stage")
                with gr.Accordion("Copy as code", open=False, elem_id="code"):
                    self.code = _html(
                        '<p class="mm-note">After a run, the call that repeats it stands here.</p>',
                        js_on_load=script("copy"),
                    )
        errors = [self.picture_error, self.prompt_error, self.method_error, self.decoding_error]
        running = run.click(
            self._run,
            [self.picture, self.prompt, self.method, *self.decoding, *(c for _, _, c in self.fields)],
            [self.stage, self.code, run, stop, *errors],
            concurrency_id=QUEUE, concurrency_limit=1, show_progress="full", show_progress_on=self.stage,
            api_visibility="private",
        )  # fmt: skip
        stop.click(self.jobs.stop, None, None, queue=False, api_visibility="private")
        self.running = running

    def _picture(self) -> None:
        first = gallery.write(Path(gr.utils.get_upload_folder()) / "gallery")[gallery.START]
        self.picture = picture_input(
            str(first), label="Picture: upload, paste, or choose below", height=190, elem_id="picture"
        )
        self.picture_error = _slot("picture-error")
        thumbs = _html(gallery.strip(), js_on_load=script("gallery"), elem_id="gallery")
        thumbs.choose(self._choose, None, [self.picture, self.picture_error], queue=False, api_visibility="private")
        self.picture.upload(self._look, self.picture, self.picture_error, queue=False, api_visibility="private")

    def _choose(self, event: gr.EventData) -> tuple[str, str]:
        index = int(event.index) if str(event.index).isdigit() else 0
        paths = gallery.write(Path(gr.utils.get_upload_folder()) / "gallery")
        return str(paths[index % len(paths)]), ""

    def _look(self, path: str | None) -> str:
        """Say at once what is wrong with an uploaded picture."""
        try:
            open_upload(path, self.service.limits)
        except MmfixError as problem:
            return error(str(problem))
        return ""

    def _method(self) -> None:
        choices = [(f"{mmfix.methods()[name].title} ({name})", name) for name in self.methods]
        self.method = gr.Dropdown(choices, value=self.first, label="Method", filterable=False, elem_id="method")
        self.about = _html(_about(self.first))
        self.method_error = _slot("method-error")
        groups = []
        with gr.Accordion("Parameters", open=False, elem_id="parameters"):
            for name in self.methods:
                base = mmfix.calibrated(self.service.model, name)
                with gr.Group(visible=name == self.first) as group:
                    self.fields += [(name, one, _component(one)) for one in controls.of(base)]
                groups.append(group)
        self.method.change(
            lambda name: [_about(name), *(gr.update(visible=name == one) for one in self.methods)],
            self.method, [self.about, *groups], queue=False, api_visibility="private",
        )  # fmt: skip

    def _decoding(self) -> None:
        with gr.Accordion("Decoding", open=False):
            self.decoding = [
                gr.Slider(1, self.service.limits.tokens, 64, step=1, label="Longest answer, in tokens"),
                gr.Checkbox(False, label="Sample", info="off: greedy, always the likeliest token"),
                gr.Slider(0.05, 3.0, 1.0, step=0.05, label="Temperature"),
                gr.Slider(0.05, 1.0, 1.0, step=0.05, label="Top p"),
                gr.Number(0, precision=0, label="Seed", minimum=0),
            ]
        self.decoding_error = _slot("decoding-error")

    def _run(self, request: gr.Request, path: str | None, prompt: str, method: str, *rest: Any) -> Iterator[list[Any]]:
        """The Compare button."""
        decoding, values = rest[: len(self.decoding)], rest[len(self.decoding) :]
        given = {
            field.name: value for (name, field, _), value in zip(self.fields, values, strict=True) if name == method
        }
        asked, errors = self._checked(path, prompt, method, given, decoding)
        idle, busy = gr.update(interactive=True), gr.update(interactive=False)
        if asked is None:
            yield [gr.skip(), gr.skip(), idle, busy, *errors]
            return
        with self.jobs.running(request.session_hash) as cancelled:
            yield [gr.skip(), gr.skip(), busy, idle, *errors]
            unchanged = [gr.skip()] * 7
            try:
                for run in self.service.run(asked, cancelled):
                    if run.state == "running":
                        yield [stage.render(run), *unchanged]
                said = code.render(self.model_id, method, asked.changed, asked.prompt, asked.decoding)
                yield [stage.render(run), said, idle, busy, *[gr.skip()] * 4]
            except MmfixError as problem:
                yield [gr.skip(), gr.skip(), idle, busy, "", "", error(str(problem)), ""]

    def _checked(
        self, path: str | None, prompt: str, method: str, given: dict[str, Any], decoding: tuple[Any, ...]
    ) -> tuple[Request | None, list[str]]:
        """The request, or a message for each control that needs one."""
        image = built = settings = None
        problems = {}
        for place, check in (
            ("picture", lambda: open_upload(path, self.service.limits)),
            ("prompt", lambda: self.service.prompt(prompt)),
            ("method", lambda: self.service.method(method, given)),
            ("decoding", lambda: Decoding(*decoding).checked(self.service.limits)),
        ):
            try:
                found: Any = check()
            except MmfixError as problem:
                problems[place] = str(problem)
                continue
            if place == "picture":
                image = found
            elif place == "method":
                built = found
            elif place == "decoding":
                settings = found
        errors = [error(problems.get(place, "")) for place in ("picture", "prompt", "method", "decoding")]
        if problems or image is None or built is None or settings is None:
            return None, errors
        return Request(image, prompt.strip(), built[0], built[1], settings), errors

    # -- Heads ----------------------------------------------------------------------------------------------------

    def heads(self) -> None:
        _html(
            '<p class="mm-note">Every attention head of the plain model, for the picture and prompt of '
            "<em>Compare</em>, at the position that chooses the first word. <em>Dependence</em> is vision-aware head "
            "divergence (VHD): how much the head's output changes when the picture is taken away. VHR strengthens the "
            "heads above the median.</p>"
        )
        button = gr.Button("Map the heads", variant="primary", elem_id="map-heads")
        problem = _slot("heads-error")
        shown = _html(js_on_load=script("heads"), elem_id="heads")
        button.click(
            self._heads, [self.picture, self.prompt], [shown, problem], concurrency_id=QUEUE, show_progress="full",
            show_progress_on=shown, api_visibility="private",
        )  # fmt: skip

    def _heads(self, path: str | None, prompt: str) -> tuple[Any, str]:
        try:
            image = open_upload(path, self.service.limits)
            found = heads.measure(self.service.decoder, image, self.service.prompt(prompt))
        except MmfixError as problem:
            return gr.skip(), error(str(problem))
        return heads.render(found, image), ""

    # -- Method lab -----------------------------------------------------------------------------------------------

    def lab(self) -> None:
        service = self.service
        _html(
            '<p class="mm-note">One parameter from end to end, on the picture of <em>Compare</em> and one yes-or-no '
            "question: does the answer change, and does the model look at the picture more?</p>"
        )
        able = [name for name in self.methods if controls.sweepable(mmfix.calibrated(service.model, name))]
        first = self.first if self.first in able else able[0]
        with gr.Row():
            choices = [(name, name) for name in able]
            method = gr.Dropdown(choices, value=first, label="Method", filterable=False, elem_id="lab-method")
            names, low, high = self._parameter(first)
            field = gr.Dropdown(names, value=names[0][1], label="Parameter", filterable=False, elem_id="lab-parameter")
            start, end = gr.Number(low, label="From"), gr.Number(high, label="To")
            things = gallery.questions(gallery.pictures()[gallery.START].image)
            thing = gr.Dropdown(
                things, value=things[0][1], label="Is there … in the image?", elem_id="lab-object", min_width=260
            )
        with gr.Row():
            button = gr.Button("Sweep", variant="primary", elem_id="sweep")
            stop = gr.Button("Stop")
        problem = _slot("lab-error")
        shown = _html(elem_id="lab")
        quiet: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        method.change(self._parameters, method, [field, start, end], **quiet)
        field.change(lambda name, one: list(self._range(name, one)), [method, field], [start, end], **quiet)
        self.picture.change(self._things, self.picture, thing, **quiet)
        button.click(
            self._sweep, [self.picture, method, field, start, end, thing], [shown, problem], concurrency_id=QUEUE,
            show_progress="full", show_progress_on=shown, api_visibility="private",
        )  # fmt: skip
        stop.click(self.jobs.stop, None, None, **quiet)

    def _parameter(self, method: str) -> tuple[list[tuple[str, str]], float, float]:
        able = controls.sweepable(mmfix.calibrated(self.service.model, method))
        return [(one.label, one.name) for one in able], *self._range(method, able[0].name)

    def _parameters(self, method: str) -> list[Any]:
        names, low, high = self._parameter(method)
        return [gr.update(choices=names, value=names[0][1]), low, high]

    def _range(self, method: str, name: str) -> tuple[float, float]:
        able = {one.name: one for one in controls.sweepable(mmfix.calibrated(self.service.model, method))}
        one = able.get(name)
        return (0.0, 1.0) if one is None else (one.low or 0.0, one.high or 1.0)

    def _things(self, path: str | None) -> Any:
        try:
            image = open_upload(path, self.service.limits)
        except MmfixError:
            return gr.skip()
        things = gallery.questions(image)
        return gr.update(choices=things, value=things[0][1])

    def _sweep(
        self, path: str | None, method: str, name: str, low: float, high: float, thing: str, request: gr.Request
    ) -> Iterator[tuple[Any, str]]:
        try:
            image = open_upload(path, self.service.limits)
            base, _ = self.service.method(method, {})
            able = {one.name: one for one in controls.sweepable(base)}
            if name not in able or thing not in dict(map(reversed, gallery.questions(None))):
                raise mmfix.errors.UsageError("choose a parameter and an object from the lists")
            at = lab.values(able[name], low, high, min(11, self.service.limits.sweep_points))
            question = gallery.question(thing)
            with self.jobs.running(request.session_hash) as cancelled:
                for found in lab.sweep(self.service.decoder, image, question, base, able[name], at, cancelled):
                    yield lab.render(found, able[name], base.info.title, question), ""
        except MmfixError as problem:
            yield gr.skip(), error(str(problem))


def _html(value: str = "", **options: Any) -> gr.HTML:
    """Markup with the app's own styles only."""
    return gr.HTML(value, apply_default_css=False, **options)


def _slot(name: str) -> gr.HTML:
    """A place for a message beside a control; takes no room while it is empty."""
    return _html(elem_id=name, elem_classes="mm-slot")


def _about(name: str) -> str:
    info = mmfix.methods()[name]
    paper = info.paper.removeprefix("arXiv:")
    link = esc(info.paper)
    if info.paper.startswith("arXiv:"):
        link = f'<a href="https://arxiv.org/abs/{esc(paper)}" rel="noreferrer">{link}</a>'
    text = (info.cls.__doc__ or "").strip().splitlines()
    passes = f"{info.passes:g} forward pass{'es' if info.passes != 1 else ''} per token"
    return f'<p class="mm-note">{esc(text[0] if text else "")} {link}, {passes}.</p>'


def _component(one: controls.Control) -> Any:
    """A control for a parameter."""
    options: dict[str, Any] = {"label": one.label, "info": one.help or None}
    if one.kind == "choice":
        return gr.Dropdown(list(one.choices), value=one.value, filterable=False, **options)
    if one.kind == "switch":
        return gr.Checkbox(one.value, **options)
    if one.kind == "text":
        return gr.Textbox(one.value, max_length=200, **options)
    if one.slider:
        return gr.Slider(one.low, one.high, one.value, step=one.step, **options)
    return gr.Number(one.value, precision=0 if one.kind == "whole" else None, **options)


def _board(folders: list[Path]) -> None:
    found = leaderboard.runs(folders)
    if not found:
        _html('<p class="mm-note">No run found. Make one with <code>mmfix eval run</code> and give its folder.</p>')
        return
    loaded = {name: leaderboard.load(path) for name, path in found.items()}
    start = next(iter(loaded))
    names = leaderboard.metrics(loaded[start])
    key = next((value for _, value in names if value.endswith("/chair_i")), names[0][1])
    with gr.Row():
        run = gr.Dropdown(list(loaded), value=start, label="Run", filterable=False, elem_id="board-run")
        metric = gr.Dropdown(names, value=key, label="Metric", filterable=False, elem_id="board-metric")
    shown = _html(leaderboard.render(loaded[start], key), js_on_load=script("table"), elem_id="board")

    def show(name: str, key: str) -> str:
        try:
            return leaderboard.render(loaded[name], key)
        except (EvalError, KeyError, ValueError):
            return error("that metric was not measured in this run; choose another")

    def change(name: str, key: str) -> list[Any]:
        options = leaderboard.metrics(loaded[name])
        kept = key if key in dict(map(reversed, options)) else options[0][1]
        return [gr.update(choices=options, value=kept), show(name, kept)]

    quiet: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    run.change(change, [run, metric], [metric, shown], **quiet)
    metric.change(show, [run, metric], shown, **quiet)
