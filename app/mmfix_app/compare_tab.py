"""The tab on which everything begins: a picture, a prompt, a method, and both answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

import mmfix
from mmfix.errors import MmfixError
from mmfix_app import code, controls, gallery, stage
from mmfix_app.jobs import Jobs
from mmfix_app.markup import error, esc
from mmfix_app.pictures import open_upload
from mmfix_app.service import Decoding, Request, Service
from mmfix_app.widgets import QUEUE, component, html, picture_input, script, slot

PROMPT = "Please describe this image in detail."
PREFERRED = "vhr"


class CompareTab:
    """Its components, which other tabs read, and its events."""

    def __init__(self, service: Service, model_id: str, jobs: Jobs) -> None:
        self.service = service
        self.model_id = model_id
        self.jobs = jobs
        self.methods = service.methods
        self.first = PREFERRED if PREFERRED in self.methods else self.methods[0]
        self.fields: list[tuple[str, controls.Control, Any]] = []

    def build(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=290):
                self._picture()
                self.prompt = gr.Textbox(
                    PROMPT, label="Prompt", lines=2, max_lines=4, max_length=self.service.limits.prompt_characters
                )
                self.prompt_error = slot("prompt-error")
                self._method()
                self._decoding()
                with gr.Row():
                    run = gr.Button("Compare", variant="primary", elem_id="run")
                    stop = gr.Button("Stop", elem_id="stop", interactive=False)
            with gr.Column(scale=7, min_width=320):
                self.stage = html(stage.empty(), js_on_load=script("stage"), elem_id="stage")
                with gr.Accordion("Copy as code", open=False, elem_id="code"):
                    self.code = html(
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
        self.picture_error = slot("picture-error")
        thumbs = html(gallery.strip(), js_on_load=script("gallery"), elem_id="gallery")
        thumbs.choose(self._choose, None, [self.picture, self.picture_error], queue=False, api_visibility="private")
        self.picture.upload(self._look, self.picture, self.picture_error, queue=False, api_visibility="private")

    def _choose(self, event: gr.EventData) -> tuple[str, str]:
        index = int(event.index) if str(event.index).isdigit() else 0
        return str(gallery.renewed(Path(gr.utils.get_upload_folder()) / "gallery", index)), ""

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
        self.about = html(_about(self.first))
        self.method_error = slot("method-error")
        groups = []
        with gr.Accordion("Parameters", open=False, elem_id="parameters"):
            for name in self.methods:
                base = mmfix.calibrated(self.service.model, name)
                with gr.Group(visible=name == self.first) as group:
                    self.fields += [(name, one, component(one)) for one in controls.of(base)]
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
        self.decoding_error = slot("decoding-error")

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


def _about(name: str) -> str:
    info = mmfix.methods()[name]
    paper = info.paper.removeprefix("arXiv:")
    link = esc(info.paper)
    if info.paper.startswith("arXiv:"):
        link = f'<a href="https://arxiv.org/abs/{esc(paper)}" rel="noreferrer">{link}</a>'
    text = (info.cls.__doc__ or "").strip().splitlines()
    passes = f"{info.passes:g} forward pass{'es' if info.passes != 1 else ''} per token"
    return f'<p class="mm-note">{esc(text[0] if text else "")} {link}, {passes}.</p>'
