"""The decoder: one model, one processor, one method; pictures and prompts in, answers out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList

import mmfix
from mmfix.distinct import encoding_once
from mmfix.errors import UsageError
from mmfix_decoding import loading, prompts
from mmfix_decoding.answer import Answer, cut
from mmfix_decoding.conversation import conversation
from mmfix_decoding.grids import PatchGrid, patch_grids
from mmfix_decoding.images import ImageSource
from mmfix_decoding.options import Plan, plan, refuse_unsettled
from mmfix_decoding.pairing import run_pair
from mmfix_decoding.prompts import ImageInput, Request
from mmfix_decoding.sampling import DrawWindow, request_seed, seeded
from mmfix_decoding.streaming import Emit, Report, Tap, TokenStream

if TYPE_CHECKING:
    from mmfix import Method

MethodLike: TypeAlias = "str | Method | Sequence[str | Method] | None"

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


class Decoder:
    """A vision-language model with its processor and, if asked for, a method against hallucination.

    Calls are serialised per model: a ``generate`` or ``stream`` that is under way on a model, through any decoder and
    from any thread, is finished before the next one starts, so that their methods never mix.

    Args:
        model: a ``transformers`` model whose ``generate()`` takes images and text.
        processor: its processor.
        method: name of a method (``mmfix.methods()``), a :class:`mmfix.Method`, a list of them, or None for the plain
            model. A name uses the parameters calibrated for the model; a ``Method`` is taken as it is.
        model_id: what to call the model; its ``name_or_path`` by default.

    Raises:
        MethodError: unknown method.
    """

    def __init__(self, model: Any, processor: Any, *, method: MethodLike = None, model_id: str | None = None) -> None:
        self.model = model
        self.processor = processor
        self.method = _known(method)
        self.model_id = model_id if model_id is not None else str(getattr(model, "name_or_path", ""))
        self._lock = _LOCKS.setdefault(model, threading.RLock())

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        method: MethodLike = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        device_map: str | dict[str, Any] | None = None,
    ) -> Decoder:
        """Load a model and its processor.

        Args:
            model: a bundled name (``mmfix_decoding.bundled()``; write ``"./tiny"`` for a folder of that name), a local
                folder, or a hub id. Weights are read from safetensors only and no code of the checkpoint is ever run.
            method: as for :class:`Decoder`.
            device: ``"auto"`` (CUDA if there is any, else CPU), or a torch device.
            dtype: ``"auto"``, ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype. Auto is the checkpoint's
                own dtype, except on a CPU, where it is float32.
            revision: branch, tag or commit of a hub model.
            device_map: ``"auto"``, ``"balanced"``, … or module name → device, as in transformers' ``from_pretrained``,
                for a model larger than one device; instead of `device`. Needs the package accelerate.

        Raises:
            UnsupportedModel: not found, no connection, a model type that is unknown or takes no image, no processor,
                missing or broken weights.
            UsageError: a device or dtype that cannot be used.
            MethodError: unknown method.
        """
        _known(method)  # before minutes of loading
        loaded, processor = loading.load(model, device, dtype, revision, device_map)
        return cls(loaded, processor, method=method, model_id=os.fspath(model))

    def with_method(self, method: MethodLike) -> Decoder:
        """A decoder with another method (or None) on the same model and processor."""
        return Decoder(self.model, self.processor, method=method, model_id=self.model_id)

    def __repr__(self) -> str:
        return f"Decoder({self.model_id!r}, method={self.method!r})"

    @overload
    def generate(
        self,
        image: ImageSource | None,
        prompt: str,
        *,
        max_new_tokens: int = ...,
        seed: int | None = ...,
        batch_size: int | None = ...,
        telemetry: bool = ...,
        **generation_kwargs: Any,
    ) -> Answer: ...

    @overload
    def generate(
        self,
        image: ImageInput,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = ...,
        seed: int | None = ...,
        batch_size: int | None = ...,
        telemetry: bool = ...,
        **generation_kwargs: Any,
    ) -> list[Answer]: ...

    def generate(
        self,
        image: ImageInput,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        seed: int | None = None,
        batch_size: int | None = None,
        telemetry: bool = False,
        **generation_kwargs: Any,
    ) -> Answer | list[Answer]:
        """Answer prompts about images.

        Decoding is greedy unless `generation_kwargs` say otherwise. Prompts are batched with left padding; in float32
        the batch does not change an answer. Equal pictures of a batch are encoded once.

        Args:
            image: one image (see :func:`mmfix_decoding.load_image`; None for a prompt without one) or a list. One image
                goes with every prompt of a list; lists of one length pair up. An element that is itself a list holds
                several images of one prompt: ``generate([[a, b]], ["Compare them."])``.
            prompt: one prompt, or a list; the model's chat template is applied to each as a user turn.
            max_new_tokens: limit on the tokens of one answer, at least 1.
            seed: at least 0; seeds the draws of this call and leaves the caller's random state untouched. When
                sampling, requests then run one by one, each with a seed made from `seed` and its own prompt and pixels:
                its answer depends neither on its place nor on its neighbours, and equal requests get equal answers.
            batch_size: requests per batch, 16 by default; lower it when memory is short.
            telemetry: record group masses for ``Answer.report``.
            **generation_kwargs: passed to ``model.generate`` unchanged (``num_beams``, ``do_sample``, ``temperature``,
                …).

        Returns:
            An :class:`Answer`; a list of them, in the order given, when `image` or `prompt` is a list.

        Raises:
            ImageError: an image that cannot be used; nothing of the call is kept.
            UsageError: lists that do not pair up, an empty prompt, an argument out of its range.
        """
        requests, many = prompts.pair(image, prompt)
        chosen = plan(self.model, self.processor, max_new_tokens, seed, batch_size, generation_kwargs)
        done: list[tuple[Request, list[int], float]] = []
        report = None
        if requests:
            with self._lock, self._mitigation(telemetry) as fix:
                for first in range(0, len(requests), chosen.batch_size):
                    batch = prompts.load_images(requests[first : first + chosen.batch_size])
                    rows, seconds = self._batch(batch, chosen)
                    done += [(one, row, seconds / len(batch)) for one, row in zip(batch, rows, strict=True)]
                report = None if fix is None else fix.report().to_dict()
        answers = [self._answer(request.prompt, row, seconds, report, chosen) for request, row, seconds in done]
        return answers if many else answers[0]

    def stream(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        seed: int | None = None,
        telemetry: bool = True,
        **generation_kwargs: Any,
    ) -> TokenStream:
        """Answer one prompt token by token; the same tokens as :meth:`generate` gives with the same arguments.

        Args:
            image: one image, None, or a list with the images of this one prompt.
            prompt: one prompt.
            max_new_tokens, seed, generation_kwargs: as for :meth:`generate`; one beam, no assistant.
            telemetry: give each event its group masses. With False and no method, nothing watches the model.

        Returns:
            An iterator over :class:`TokenEvent` with ``close()`` and, after its end, ``report``.

        Raises:
            ImageError, UsageError: as for :meth:`generate`, at once and not at the first ``next()``.
        """
        if not isinstance(prompt, str):
            raise UsageError("stream() takes one prompt; give a string, or use generate() for a list")
        return self._stream(prompts.single(image, prompt), max_new_tokens, seed, telemetry, generation_kwargs)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 128,
        seed: int | None = None,
        telemetry: bool = False,
        max_prompt_tokens: int | None = None,
        **generation_kwargs: Any,
    ) -> TokenStream:
        """Answer a conversation token by token.

        One user message with its images before one text gives the same tokens as :meth:`stream` does.

        Args:
            messages: ``{"role", "content"}`` as transformers has them: an optional system message, then user and
                assistant messages, the last one a user's; content is a text or a list of
                ``{"type": "text", "text": …}`` and ``{"type": "image", "image": source}``.
            max_prompt_tokens: most tokens that the prompt may have, image tokens included.
            max_new_tokens, seed, telemetry, generation_kwargs: as for :meth:`stream`.

        Raises:
            PromptTooLong: by the first ``next()``; nothing has been computed.
            ImageError, UsageError: as for :meth:`stream`; messages that are not a conversation.
        """
        talk = conversation(messages, max_prompt_tokens)
        request = Request(talk.prompt, talk.sources, talk=talk)
        return self._stream(request, max_new_tokens, seed, telemetry, generation_kwargs)

    def _stream(
        self, request: Request, max_new_tokens: int, seed: int | None, telemetry: bool, kwargs: dict[str, Any]
    ) -> TokenStream:
        chosen = plan(self.model, self.processor, max_new_tokens, seed, 1, kwargs)
        refuse_unsettled(self.model, chosen, self.method)
        request = request.load()

        def produce(emit: Emit, cancelled: threading.Event) -> Report | None:
            return self._produce(request, chosen, telemetry, emit, cancelled)

        return TokenStream(produce)

    def stream_pair(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        seed: int | None = None,
        **generation_kwargs: Any,
    ) -> TokenStream:
        """Answer one prompt twice at once, plainly and with this decoder's method: two rows of one batch.

        Each side gets the tokens that :meth:`generate` gives it alone with the same arguments (in float32).

        Args:
            image, prompt, max_new_tokens, seed, generation_kwargs: as for :meth:`stream`.

        Returns:
            An iterator over :class:`TokenEvent` with ``side`` ``"plain"`` or ``"method"``, group masses and
            ``image_weights``. The report after its end is the method's (its counts of places looked at cover both);
            ``report["one_batch"]`` is False for a method that acts on whole batches, which runs after the plain model.

        Raises:
            ImageError, UsageError: as for :meth:`generate`, at once and not at the first ``next()``.
        """
        if not isinstance(prompt, str):
            raise UsageError("stream_pair() takes one prompt; give a string")
        request = prompts.single(image, prompt)
        chosen = plan(self.model, self.processor, max_new_tokens, seed, 1, generation_kwargs)
        refuse_unsettled(self.model, chosen, self.method)
        request = request.load()
        given: Any = self.method if isinstance(self.method, (list, tuple)) else [self.method] if self.method else []
        methods = [mmfix.calibrated(self.model, one) if isinstance(one, str) else one for one in given]

        def produce(emit: Emit, cancelled: threading.Event) -> Report | None:
            if not self._acquire(cancelled):
                return None
            try:
                return run_pair(self, methods, request, chosen, emit, cancelled)
            finally:
                self._lock.release()

        return TokenStream(produce)

    def image_grids(self, image: ImageSource, prompt: str) -> list[PatchGrid]:
        """Where in `image` each of its tokens lies; empty when this family's layout is not known."""
        request = prompts.single(image, prompt).load()
        inputs = prompts.encode([request], self.processor, self.model)
        tokens = int((inputs["input_ids"] == mmfix.describe(self.model).image_token_id).sum())
        return patch_grids(inputs, tokens, self.model, self.processor, request.images[0].size)

    # -- one batch ----------------------------------------------------------------------------------------------

    def _batch(self, batch: Sequence[Request], chosen: Plan) -> tuple[list[list[int]], float]:
        """Generated rows of ids, and the seconds of ``model.generate``."""
        inputs = prompts.encode(batch, self.processor, self.model)
        width = inputs["input_ids"].shape[1]
        seed = chosen.seed
        if seed is not None and chosen.sampling:
            seed = request_seed(seed, batch[0])
        start = time.perf_counter()
        with nullcontext() if seed is None else seeded(seed, self.model.device):
            rows = self.call_generate(inputs, chosen.kwargs).tolist()
        return [row[width:] for row in rows], time.perf_counter() - start

    def call_generate(self, inputs: dict[str, Tensor], kwargs: dict[str, Any]) -> Any:
        """``model.generate``, with an unknown argument told as a :class:`UsageError`."""
        try:
            return self.model.generate(**inputs, **kwargs)
        except ValueError as error:
            if "`model_kwargs` are not used" not in str(error):
                raise
            names = str(error).partition("[")[2].partition("]")[0]
            raise UsageError(f"unknown generation argument: {names}; see model.generate() for what there is") from error

    def _answer(self, prompt: str, row: list[int], seconds: float, report: Report | None, chosen: Plan) -> Answer:
        ids, reason = cut(row, chosen.stop_ids, chosen.pad_id, chosen.max_new_tokens)
        tokenizer = self.processor.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Answer(text, ids, tokenizer.convert_ids_to_tokens(ids), prompt, reason, seconds, report)

    def _produce(
        self, request: Request, chosen: Plan, telemetry: bool, emit: Emit, cancelled: threading.Event
    ) -> Report | None:
        """The body of a stream's worker thread."""
        if not self._acquire(cancelled):
            return None
        try:
            with self._mitigation(telemetry) as fix:
                window = None
                if chosen.seed is not None and chosen.sampling:
                    window = DrawWindow(request_seed(chosen.seed, request), self.model.device)

                def masses() -> dict[str, float] | None:
                    now = fix.masses() if fix is not None and telemetry else None
                    return None if now is None else {group: float(mass[0]) for group, mass in now.items()}

                tap = Tap(self.processor.tokenizer, chosen.stop_ids, masses, emit, cancelled, window)
                kwargs = dict(chosen.kwargs, return_dict_in_generate=True, output_scores=True)
                kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), tap])
                if window is not None:
                    kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), window])
                try:
                    self.call_generate(prompts.encode([request], self.processor, self.model), kwargs)
                finally:
                    if window is not None:
                        window.leave()
                tap.finish()
                return None if fix is None else fix.report().to_dict()
        finally:
            self._lock.release()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the model: no ``generate`` or ``stream`` of any decoder on it runs inside the block."""
        with self._lock:
            yield

    def _acquire(self, cancelled: threading.Event) -> bool:
        """Wait for the model; False when the stream was closed meanwhile."""
        while not self._lock.acquire(timeout=0.05):
            if cancelled.is_set():
                return False
        return True

    @contextmanager
    def _mitigation(self, telemetry: bool) -> Iterator[mmfix.Mitigation | None]:
        """The decoder's method on the model; the untouched model when there is neither method nor telemetry."""
        with encoding_once(self.model):
            if self.method is None and not telemetry:
                yield None
                return
            with mmfix.mitigate(self.model, self.method, processor=self.processor, telemetry=telemetry) as fix:
                yield fix


def _known(method: MethodLike) -> MethodLike:
    """`method` unchanged; raises MethodError for a name that is not registered."""
    for one in [method] if isinstance(method, str) else method if isinstance(method, (list, tuple)) else ():
        if isinstance(one, str):
            mmfix.method(one)
    return method
