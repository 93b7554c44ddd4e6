"""One model, and runs on it: both answers together, within the caps, and the model free again on any way out."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

import mmfix
from mmfix import Method
from mmfix.engine import described
from mmfix.errors import MethodError, MmfixError, UsageError
from mmfix_app import controls, gallery
from mmfix_app.limits import Limits
from mmfix_decoding import Decoder, TokenEvent
from mmfix_decoding.grids import PatchGrid, raster
from mmfix_decoding.prompts import image_token

TICK = 0.08
"""Seconds between two updates of the page: more often is not seen, and only costs."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen."""

    max_new_tokens: int = 64
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def checked(self, limits: Limits) -> Decoding:
        """The same with numbers of their types.

        Raises:
            UsageError: a number out of its range; the message names the control.
        """
        ranges: dict[str, tuple[float, float, type]] = {
            "max_new_tokens": (1, limits.tokens, int), "temperature": (0.05, 5.0, float),
            "top_p": (0.05, 1.0, float), "seed": (0, 2**31 - 1, int),
        }  # fmt: skip
        values: dict[str, Any] = {"sample": bool(self.sample)}
        for name, (low, high, kind) in ranges.items():
            given = getattr(self, name)
            whole = kind is float or (isinstance(given, (int, float)) and math.isfinite(given) and int(given) == given)
            if not isinstance(given, (int, float)) or isinstance(given, bool) or not low <= given <= high or not whole:
                word = "whole number" if kind is int else "number"
                raise UsageError(f"{name.replace('_', ' ')}: give a {word} from {low:g} to {high:g}")
            values[name] = kind(given)
        return Decoding(**values)

    @property
    def kwargs(self) -> dict[str, Any]:
        """For ``generate()``, the seed and the limit aside."""
        if not self.sample:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


@dataclass(frozen=True)
class Request:
    """What a visitor asked for, checked."""

    image: Image.Image = field(repr=False)
    prompt: str
    method: Method
    changed: dict[str, Any]
    decoding: Decoding

    @property
    def contents(self) -> tuple[str, ...] | None:
        """What the picture is known to hold, or None."""
        shown = gallery.known(self.image)
        return None if shown is None else shown.contents


@dataclass(frozen=True)
class Token:
    """One token of an answer as the page shows it.

    Args:
        text: its text; empty while a character is unfinished.
        masses: attention by key group, shares of picture, sinks and text.
        share: attention on the picture, its sinks included.
        weights: Float[rows, columns], its attention over the picture, or None.
    """

    text: str
    masses: dict[str, float]
    share: float | None
    weights: npt.NDArray[Any] | None
    logprob: float


@dataclass(frozen=True)
class Run:
    """A run up to now.

    Args:
        state: ``"running"``, ``"done"``, ``"stopped"`` (by the visitor) or ``"timeout"``.
        report: of the method, once done.
        first_token: seconds until the first token.
    """

    request: Request
    plain: tuple[Token, ...] = ()
    method: tuple[Token, ...] = ()
    state: str = "running"
    report: dict[str, Any] | None = None
    first_token: float | None = None
    mapped: bool = True

    def side(self, name: str) -> tuple[Token, ...]:
        return self.plain if name == "plain" else self.method

    def text(self, name: str) -> str:
        return "".join(token.text for token in self.side(name)).strip()

    @property
    def fired(self) -> int:
        """How many places the method changed."""
        counted = (self.report or {}).get("fired") or {}
        return int(sum(found["fired"] for found in counted.values()))


class Service:
    """The model that the app serves.

    Args:
        decoder: the plain decoder.
        limits: caps.
    """

    def __init__(self, decoder: Decoder, limits: Limits | None = None) -> None:
        self.decoder = decoder
        self.limits = limits or Limits()

    @property
    def model(self) -> Any:
        return self.decoder.model

    @cached_property
    def family(self) -> mmfix.Family:
        """The model as methods see it, with what its processor tells."""
        return described(self.model, self.decoder.processor)

    @cached_property
    def methods(self) -> list[str]:
        """Methods that can run on this model; names of others are refused."""
        found = []
        for name in mmfix.methods():
            try:
                method = controls.started(self.model, name).prepare(self.family)
            except MmfixError:
                continue  # such as VAR without sink dimensions
            if method.search() is None:  # a search has its answer at the end, and nothing to show before
                found.append(name)
        return found

    def request(
        self, image: Image.Image, prompt: str, method: str, given: dict[str, Any], decoding: Decoding
    ) -> Request:
        """Check everything a visitor gave.

        Raises:
            MmfixError: says what to change.
        """
        built, changed = self.method(method, given)
        return Request(image, self.prompt(prompt), built, changed, decoding.checked(self.limits))

    def prompt(self, prompt: str) -> str:
        """A prompt within the caps, or UsageError."""
        text = (prompt or "").strip()
        if not text:
            raise UsageError("the prompt is empty; write a question or an instruction")
        if len(text) > self.limits.prompt_characters:
            raise UsageError(
                f"the prompt has {len(text)} characters; at most {self.limits.prompt_characters} are taken"
            )
        token = image_token(self.decoder.processor)
        if token and token in text:
            raise UsageError(f"the prompt holds {token}, which stands for the picture; leave it out")
        return text

    def method(self, name: str, given: dict[str, Any]) -> tuple[Method, dict[str, Any]]:
        """A method of the list with a visitor's parameters, and those that differ from the model's own."""
        if name not in self.methods:
            raise MethodError(f"method {name!r} is not one of: {', '.join(self.methods)}")
        built, changed = controls.build(self.model, name, given)
        built.prepare(self.family)  # refuses what does not fit this model
        return built, changed

    def run(self, request: Request, cancelled: threading.Event | None = None) -> Iterator[Run]:
        """Both answers as they grow. Closing the iterator, `cancelled` and the time limit all free the model."""
        cancelled = cancelled or threading.Event()
        start = time.monotonic()
        grids = self.decoder.image_grids(request.image, request.prompt)
        run = Run(request, mapped=bool(grids))
        stream = self.decoder.with_method(request.method).stream_pair(
            request.image, request.prompt, max_new_tokens=request.decoding.max_new_tokens,
            seed=request.decoding.seed, **request.decoding.kwargs,
        )  # fmt: skip
        state, shown = "done", 0.0
        watch = _Deadline(stream, cancelled, self.limits.seconds)
        try:
            with watch:
                for event in stream:
                    run = _grown(run, event, grids)
                    now = time.monotonic()
                    if run.first_token is None:
                        run = replace(run, first_token=now - start)
                    if now - shown >= TICK and run.plain:
                        shown = now
                        yield run
            if watch.reason:
                state = watch.reason
            report = stream.report
        finally:
            stream.close()
        yield replace(run, state=state, report=report)


class _Deadline:
    """Cancels a stream when the visitor leaves or the time is over."""

    def __init__(self, stream: Any, cancelled: threading.Event, seconds: float) -> None:
        self._stream = stream
        self._cancelled = cancelled
        self._seconds = seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mmfix-app-deadline", daemon=True)
        self.reason = ""

    def _watch(self) -> None:
        end = time.monotonic() + self._seconds
        while not self._done.wait(0.05):
            if self._cancelled.is_set() or time.monotonic() > end:
                self.reason = "stopped" if self._cancelled.is_set() else "timeout"
                self._stream.cancel()
                return

    def __enter__(self) -> _Deadline:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def _grown(run: Run, event: TokenEvent, grids: list[PatchGrid]) -> Run:
    weights = raster(event.image_weights, grids) if event.image_weights is not None and grids else None
    masses = event.masses or {}
    token = Token(event.text, _exclusive(masses), masses.get("image"), weights, event.logprob)
    if event.side == "plain":
        return replace(run, plain=(*run.plain, token))
    return replace(run, method=(*run.method, token))


def _exclusive(masses: dict[str, float]) -> dict[str, float]:
    """Shares of picture, sinks and text, which sum to one."""
    if not masses:
        return {}
    sinks = masses.get("image_sink", 0.0) + masses.get("text_sink", 0.0)
    image = masses.get("image", 0.0) - masses.get("image_sink", 0.0)
    return {"image": max(image, 0.0), "sink": sinks, "text": float(np.clip(1.0 - sinks - image, 0.0, 1.0))}
