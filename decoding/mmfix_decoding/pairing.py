"""One prompt answered twice in one batch: row 0 by the plain model, row 1 with a method.

The method is confined to row 1 (:func:`mmfix.confine.confine`), so both answers advance token by token together, see
the same pixels and, when sampling, the same random numbers. A method that cannot be confined runs after the plain
model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import mmfix
from mmfix import Method
from mmfix.confine import confine
from mmfix.distinct import encoding_once
from mmfix.errors import ConflictError, UsageError
from mmfix.recording import AttentionRecorder, record_attention
from mmfix_decoding import prompts
from mmfix_decoding.answer import TokenEvent
from mmfix_decoding.options import Plan
from mmfix_decoding.prompts import Request
from mmfix_decoding.sampling import request_seed
from mmfix_decoding.streaming import Emit, Report, Tap

PLAIN, METHOD = SIDES = ("plain", "method")


# Sampling parameters that the pair applies itself, with the values that transformers fills in, and the neutral ones.
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_OTHER = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def warpers(model: Any, kwargs: dict[str, Any]) -> tuple[LogitsProcessorList, dict[str, Any]]:
    """Warpers of the effective sampling parameters, and `kwargs` in which those parameters do nothing.

    Raises:
        UsageError: a sampling parameter that is not one of temperature, top_k, top_p and min_p.
    """
    config = kwargs.get("generation_config") or model.generation_config

    def value(name: str) -> Any:
        found = kwargs.get(name)
        return found if found is not None else getattr(config, name, None)

    for name in _OTHER:
        if value(name) not in (None, 0, 0.0, 1.0):
            raise UsageError(f"stream_pair() does not draw with {name}; use temperature, top_k, top_p or min_p")
    chosen: dict[str, Any] = {
        name: value(name) if value(name) is not None else default for name, default in _DEFAULTS.items()
    }
    found = LogitsProcessorList()  # in the order of generate()
    if chosen["temperature"] != 1.0:
        found.append(TemperatureLogitsWarper(chosen["temperature"]))
    if chosen["top_k"]:
        found.append(TopKLogitsWarper(chosen["top_k"]))
    if chosen["top_p"] < 1.0:
        found.append(TopPLogitsWarper(chosen["top_p"]))
    if chosen["min_p"]:
        found.append(MinPLogitsWarper(chosen["min_p"]))
    neutral = {name: _NEUTRAL[name] for name in _DEFAULTS if name != "min_p" or chosen["min_p"]}
    return found, {**kwargs, **neutral}


class PairDraws(LogitsProcessor):  # type: ignore[misc]
    """Draws a token per row from a generator per row, and leaves that token as the only choice.

    A row then gets the tokens that it would get alone, with the same seed. ``generate()`` warps scores after every
    processor it is given, so the warpers are applied here.
    """

    def __init__(self, seed: int, rows: int, device: torch.device, warp: LogitsProcessorList) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for _ in range(rows)]
        self._warp = warp
        self.scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores = scores = self._warp(input_ids, scores)
        only = torch.full_like(scores, float("-inf"))
        for n, generator in enumerate(self._generators):
            drawn = torch.multinomial(torch.softmax(scores[n : n + 1], dim=-1), 1, generator=generator)
            only[n, drawn[0]] = 0.0
        return only


class Watch:
    """Reads masses and image weights of the newest tokens, row by row."""

    def __init__(self, fix: mmfix.Mitigation, recorder: AttentionRecorder, image: Tensor) -> None:
        self._fix = fix
        self._recorder = recorder
        self._image = image  # Bool[rows, prompt tokens]
        self._masses: dict[str, list[float]] = {}
        self._weights: list[tuple[float, ...]] | None = None

    def read(self) -> None:
        """Once per forward pass."""
        now = self._fix.masses() or {}
        self._masses = {group: mass.tolist() for group, mass in now.items()}
        rows, width = self._image.shape
        found = self._recorder.weights()
        self._weights = None
        if found is not None and found.shape[1] % rows == 0 and found.shape[-1] >= width:
            mean = found[:, :: found.shape[1] // rows].mean((0, 2))[:, :width]  # of the factual rows
            self._weights = [tuple(mean[n][self._image[n]].tolist()) for n in range(rows)]

    def masses(self, row: int) -> dict[str, float] | None:
        return {group: values[row] for group, values in self._masses.items()} or None

    def weights(self, row: int) -> tuple[float, ...] | None:
        return None if self._weights is None else self._weights[row]


class PairTap(StoppingCriteria):  # type: ignore[misc]
    """A :class:`Tap` per row."""

    def __init__(
        self, taps: list[Tap], read: Callable[[], None], cancelled: threading.Event, draws: PairDraws | None
    ) -> None:
        self._taps = taps
        self._read = read
        self._cancelled = cancelled
        self._draws = draws

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...], **kwargs: Any) -> Tensor:
        self._read()
        last = scores[-1] if self._draws is None else self._draws.scores
        assert last is not None
        for n, tap in enumerate(self._taps):
            tap.step(int(input_ids[n, -1]), last[n])
        scores[-1].data = scores[-1].new_empty(0)
        return torch.full((input_ids.shape[0],), self._cancelled.is_set(), dtype=torch.bool, device=input_ids.device)


def run_pair(
    decoder: Any, methods: list[Method], request: Request, chosen: Plan, emit: Emit, cancelled: threading.Event
) -> Report:
    """Generate both answers; the method's report, with ``"one_batch"`` saying how they ran."""
    started = False

    def first(event: TokenEvent) -> None:
        nonlocal started
        started = True
        emit(event)

    try:
        together = [confine(one, (False, True)) for one in methods]
        report = _run(decoder, together, SIDES, request, chosen, first, cancelled)
    except ConflictError:
        if started:
            raise
        _run(decoder, [], (PLAIN,), request, chosen, emit, cancelled)
        report = _run(decoder, methods, (METHOD,), request, chosen, emit, cancelled)
        return {**report, "one_batch": False}
    return {**report, "one_batch": True}


def _run(
    decoder: Any,
    methods: list[Method],
    sides: tuple[str, ...],
    request: Request,
    chosen: Plan,
    emit: Emit,
    cancelled: threading.Event,
) -> Report:
    model, processor = decoder.model, decoder.processor
    with ExitStack() as stack:
        stack.enter_context(encoding_once(model))
        fix = stack.enter_context(mmfix.mitigate(model, methods, processor=processor, telemetry=True))
        recorder = stack.enter_context(record_attention(model))
        inputs = prompts.encode([request] * len(sides), processor, model)
        watch = Watch(fix, recorder, inputs["input_ids"] == mmfix.describe(model).image_token_id)
        draws, settings = None, chosen.kwargs
        if chosen.sampling:
            warp, settings = warpers(model, settings)
            seed = int(torch.randint(2**62, ())) if chosen.seed is None else request_seed(chosen.seed, request)
            draws = PairDraws(seed, len(sides), model.device, warp)
        taps = [
            Tap(
                processor.tokenizer, chosen.stop_ids, partial(watch.masses, n), emit, cancelled, None,
                weights=partial(watch.weights, n), side=side,
            )
            for n, side in enumerate(sides)
        ]  # fmt: skip
        kwargs = dict(settings, return_dict_in_generate=True, output_scores=True)
        own = PairTap(taps, watch.read, cancelled, draws)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), own])
        if draws is not None:
            kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), draws])
        decoder.call_generate(inputs, kwargs)
        for tap in taps:
            tap.finish()
        return fix.report().to_dict()
