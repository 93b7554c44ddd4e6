"""The page: tabs over one model."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from mmfix_app.api import Api
from mmfix_app.compare_tab import CompareTab
from mmfix_app.jobs import Jobs
from mmfix_app.markup import esc
from mmfix_app.other_tabs import HeadsTab, LabTab, board
from mmfix_app.service import Service
from mmfix_app.widgets import QUEUE, html, picture_input, script


def build(service: Service, model_id: str, run_folders: list[Path], *, mcp: bool = False) -> gr.Blocks:
    """The whole app."""
    cache = (service.limits.look_seconds, service.limits.keep_seconds)
    with gr.Blocks(title="mmfix", analytics_enabled=False, delete_cache=cache) as demo:
        html(_header(model_id), js_on_load=script("header"))
        jobs = Jobs()
        compare = CompareTab(service, model_id, jobs)
        with gr.Tab("Compare"):
            compare.build()
        with gr.Tab("Heads"):
            HeadsTab(compare).build()
        with gr.Tab("Method lab"):
            LabTab(compare).build()
        with gr.Tab("Leaderboard"):
            board(run_folders)
        Api(service, jobs).add(picture_input, QUEUE, mcp)
        demo.unload(jobs.leave)
    return demo


def _header(model_id: str) -> str:
    return (
        '<header class="mm-head"><h1>mmfix</h1><p>What does a vision-language model say that is not in the picture, '
        f'and what does a method in its attention change?</p><span class="chip">model: {esc(model_id)}</span>'
        '<button type="button" class="theme">Light / dark</button></header>'
    )
