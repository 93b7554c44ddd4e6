"""What programs may call: the same runs as the page, under the same caps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

import mmfix
from mmfix.errors import MmfixError
from mmfix_app import gallery, objects
from mmfix_app.jobs import Jobs
from mmfix_app.pictures import open_base64, open_upload
from mmfix_app.service import Decoding, Request, Run, Service


class Api:
    """Named endpoints; errors come back as messages."""

    def __init__(self, service: Service, jobs: Jobs) -> None:
        self.service = service
        self.jobs = jobs

    def add(self, picture: Any, queue: str, mcp: bool) -> None:
        """Register them; `picture` makes an image box. An MCP server offers `describe_image` alone."""
        seen: Any = "undocumented" if mcp else "public"
        with gr.Row(visible=False):
            image = picture(label="image")
            prompt, method = gr.Textbox(label="prompt"), gr.Textbox(label="method")
            params, decoding, answer = gr.JSON(label="params"), gr.JSON(label="decoding"), gr.JSON(label="answer")
            gr.Button("compare").click(
                self.compare, [image, prompt, method, params, decoding], answer, api_name="compare",
                api_visibility=seen, concurrency_id=queue,
            )  # fmt: skip
        gr.api(self.methods, api_name="methods", api_visibility=seen, queue=False)
        described = self.describe_image_as_text if mcp else self.describe_image
        gr.api(described, api_name="describe_image", concurrency_id=queue)

    def compare(
        self, image: str | None, prompt: str, method: str, params: dict[str, Any] | None,
        decoding: dict[str, Any] | None, request: gr.Request,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Both answers to a prompt about a picture as they grow, with objects and attention on the picture."""
        asked = _told(lambda: self._request(open_upload(image, self.service.limits), prompt, method, params, decoding))
        with self.jobs.running(request.session_hash) as cancelled:
            for run in self.service.run(asked, cancelled):
                yield _content(run)

    def methods(self) -> dict[str, dict[str, Any]]:
        """Methods that this app runs, with their parameters."""
        found = {}
        for name in self.service.methods:
            info = mmfix.methods()[name]
            params = {key: {"default": repr(p.default), "help": p.help} for key, p in info.params.items()}
            found[name] = {"title": info.title, "paper": info.paper, "kind": info.kind, "params": params}
        return found

    def describe_image(
        self, image: str, prompt: str = "Please describe this image in detail.", method: str = "vhr"
    ) -> dict[str, Any]:
        """Describe a picture twice, by the plain model and with a training-free method against hallucination.

        Args:
            image: a PNG, JPEG or WebP picture as base64 (at most 10 MB), or the file name of a picture of the gallery.
            prompt: a question or an instruction about the picture.
            method: name of the method.
        """
        known = {one.name: one.image for one in gallery.pictures()}
        picture = known[image] if image in known else _told(lambda: open_base64(image, self.service.limits))
        asked = _told(lambda: self._request(picture, prompt, method, None, None))
        return _content(list(self.service.run(asked))[-1])

    def describe_image_as_text(
        self, image: str, prompt: str = "Please describe this image in detail.", method: str = "vhr"
    ) -> str:
        return json.dumps(self.describe_image(image, prompt, method), ensure_ascii=False)

    # MCP calls a tool as its function is called, and shows its description. gradio hands an object over as Python
    # prints it, so a text of JSON is given here.
    describe_image_as_text.__name__ = describe_image.__name__
    describe_image_as_text.__doc__ = describe_image.__doc__

    def _request(
        self, image: Any, prompt: str, method: str, params: dict[str, Any] | None, decoding: dict[str, Any] | None
    ) -> Request:
        for given in (params, decoding):
            if given is not None and not isinstance(given, dict):
                raise mmfix.errors.UsageError("params and decoding are objects of names and values")
        unknown = set(decoding or {}) - set(Decoding.__dataclass_fields__)
        if unknown:
            names = ", ".join(Decoding.__dataclass_fields__)
            raise mmfix.errors.UsageError(f"decoding has no {sorted(unknown)[0]!r}; it has: {names}")
        return self.service.request(image, prompt, method, params or {}, Decoding(**(decoding or {})))


def _told(make: Any) -> Any:
    try:
        return make()
    except MmfixError as problem:
        raise gr.Error(str(problem), print_exception=False) from problem


def _content(run: Run) -> dict[str, Any]:
    """A run as JSON."""
    contents = run.request.contents
    return {
        "state": run.state,
        "method": mmfix.spec(run.request.method),
        "contents": None if contents is None else list(contents),
        "answers": {
            name: {
                "text": run.text(name),
                "tokens": [token.text for token in run.side(name)],
                "image_mass": [round(token.share, 4) for token in run.side(name)],
                "objects": objects.by_verdict(run.text(name), contents),
            }
            for name in ("plain", "method")
        },
        "fired": (run.report or {}).get("fired"),
        "one_batch": (run.report or {}).get("one_batch"),
    }
