"""Heads, method lab and leaderboard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

import mmfix
from mmfix.errors import MmfixError
from mmfix_app import controls, gallery, heads, lab, leaderboard
from mmfix_app.compare_tab import CompareTab
from mmfix_app.markup import error
from mmfix_app.pictures import open_upload
from mmfix_app.widgets import QUEUE, QUIET, html, script, slot
from mmfix_evals.errors import EvalError


class HeadsTab:
    """The layer by head map of the picture and prompt of Compare."""

    def __init__(self, compare: CompareTab) -> None:
        self.compare = compare
        self.service = compare.service

    def build(self) -> None:
        html(
            '<p class="mm-note">Every attention head of the plain model, for the picture and prompt of '
            "<em>Compare</em>, at the position that chooses the first word. <em>Dependence</em> is vision-aware head "
            "divergence (VHD): how much the head's output changes when the picture is taken away. VHR strengthens the "
            "heads above the median.</p>"
        )
        button = gr.Button("Map the heads", variant="primary", elem_id="map-heads")
        problem = slot("heads-error")
        shown = html(js_on_load=script("heads"), elem_id="heads")
        button.click(
            self._heads, [self.compare.picture, self.compare.prompt], [shown, problem], concurrency_id=QUEUE,
            show_progress="full", show_progress_on=shown, api_visibility="private",
        )  # fmt: skip

    def _heads(self, path: str | None, prompt: str) -> tuple[Any, str]:
        try:
            image = open_upload(path, self.service.limits)
            found = heads.measure(self.service.decoder, image, self.service.prompt(prompt))
        except MmfixError as problem:
            return gr.skip(), error(str(problem))
        return heads.render(found, image), ""


class LabTab:
    """A sweep of one parameter."""

    def __init__(self, compare: CompareTab) -> None:
        self.compare = compare
        self.service = compare.service
        self.jobs = compare.jobs

    def build(self) -> None:
        service = self.service
        html(
            '<p class="mm-note">One parameter from end to end, on the picture of <em>Compare</em> and one yes-or-no '
            "question: does the answer change, and does the model look at the picture more?</p>"
        )
        able = [name for name in self.service.methods if controls.sweepable(mmfix.calibrated(service.model, name))]
        first = self.compare.first if self.compare.first in able else able[0]
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
            stop = gr.Button("Stop", elem_id="sweep-stop")
        problem = slot("lab-error")
        shown = html(elem_id="lab")

        method.change(self._parameters, method, [field, start, end], **QUIET)
        field.change(lambda name, one: list(self._range(name, one)), [method, field], [start, end], **QUIET)
        self.compare.picture.change(self._things, self.compare.picture, thing, **QUIET)
        button.click(
            self._sweep, [self.compare.picture, method, field, start, end, thing], [shown, problem],
            concurrency_id=QUEUE, show_progress="full", show_progress_on=shown, api_visibility="private",
        )  # fmt: skip
        stop.click(self.jobs.stop, None, None, **QUIET)

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
            end = time.monotonic() + self.service.limits.seconds
            with self.jobs.running(request.session_hash) as cancelled:
                for found in lab.sweep(self.service.decoder, image, question, base, able[name], at, cancelled):
                    yield lab.render(found, able[name], base.info.title, question), ""
                    if time.monotonic() > end:
                        yield gr.skip(), error("stopped at the time limit; sweep a shorter range")
                        return
        except MmfixError as problem:
            yield gr.skip(), error(str(problem))


def board(folders: list[Path]) -> None:
    loaded, refused = leaderboard.readable(folders)
    for problem in refused:
        html(error(problem))
    if not loaded:
        html('<p class="mm-note">No run found. Make one with <code>mmfix eval run</code> and give its folder.</p>')
        return
    start = next(iter(loaded))
    names = leaderboard.metrics(loaded[start])
    key = next((value for _, value in names if value.endswith("/chair_i")), names[0][1])
    with gr.Row():
        run = gr.Dropdown(list(loaded), value=start, label="Run", filterable=False, elem_id="board-run", min_width=260)
        metric = gr.Dropdown(names, value=key, label="Metric", filterable=False, elem_id="board-metric", min_width=260)
    shown = html(leaderboard.render(loaded[start], key), js_on_load=script("table"), elem_id="board")

    def show(name: str, key: str) -> str:
        try:
            return leaderboard.render(loaded[name], key)
        except (EvalError, KeyError, ValueError):
            return error("that metric was not measured in this run; choose another")

    def change(name: str, key: str) -> list[Any]:
        options = leaderboard.metrics(loaded[name])
        kept = key if key in dict(map(reversed, options)) else options[0][1]
        return [gr.update(choices=options, value=kept), show(name, kept)]

    run.change(change, [run, metric], [metric, shown], **QUIET)
    metric.change(show, [run, metric], shown, **QUIET)
