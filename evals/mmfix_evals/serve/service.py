"""What the endpoints share: the model, its methods, the line before it and the counters."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from mmfix_decoding import Decoder
from mmfix_evals.machine import version
from mmfix_evals.serve.catalogue import Catalogue
from mmfix_evals.serve.chat_request import ChatRequest, parse
from mmfix_evals.serve.errors import ApiError
from mmfix_evals.serve.fetch import Fetcher
from mmfix_evals.serve.generation import Generation
from mmfix_evals.serve.line import Line
from mmfix_evals.serve.metrics import Metrics
from mmfix_evals.serve.pictures import Pictures
from mmfix_evals.serve.settings import Settings

CHARACTERS_PER_TOKEN = 64
"""Text far beyond what any tokenizer fits into the context is refused before it costs time to tokenize."""


class Service:
    """One model behind one server.

    Args:
        decoder: the model; its own method plays no part.
        catalogue: names and methods.
        settings: limits.
        fetcher: for remote images; made from the settings by default, None where they forbid them.
    """

    def __init__(
        self, decoder: Decoder, catalogue: Catalogue, settings: Settings, fetcher: Fetcher | None = None
    ) -> None:
        self.decoder = decoder
        self.catalogue = catalogue
        self.settings = settings
        self.line = Line(settings.max_queue)
        self.metrics = Metrics(
            lambda: self.line.waiting, lambda: self.line.generating, version=version(), model=catalogue.name,
            method=catalogue.default.name,
        )  # fmt: skip
        self.created = int(time.time())
        self.context = _context(decoder.model)
        if fetcher is None and settings.allow_remote_images:
            fetcher = Fetcher(settings.max_image_bytes)
        self._fetcher = fetcher
        self._running: dict[asyncio.Task[None], Generation] = {}

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.decoder.processor.tokenizer

    def parse(self, body: bytes) -> ChatRequest:
        """Check a request; blocks while remote images are fetched. Raises :class:`ApiError`."""
        chat = parse(body, self.catalogue, self.settings, Pictures(self.settings, self._fetcher))
        if self.context is not None and chat.characters > CHARACTERS_PER_TOKEN * self.context:
            raise ApiError(
                400, f"the messages have {chat.characters:,} characters, far above the model's context of "
                f"{self.context} tokens; shorten them", "context_length_exceeded", param="messages",
            )  # fmt: skip
        return chat

    def generation(self, chat: ChatRequest) -> Generation:
        """A generation that has not begun."""
        decoder = self.decoder.with_method(list(chat.arm.methods) or None)
        return Generation(decoder, chat, self.context)

    async def begin(self, generation: Generation, method: str, arrived: float) -> None:
        """Wait for the model and start; the model is free again when the generation has ended, not before."""
        await self.line.turn()
        # Nothing is awaited between getting the model and arranging its return, so that no cancellation can lose it.
        generation.start()
        task = asyncio.create_task(self._give_back(generation, method, arrived))
        self._running[task] = generation
        task.add_done_callback(self._running.pop)

    async def _give_back(self, generation: Generation, method: str, arrived: float) -> None:
        started = time.perf_counter()
        await generation.finished.wait()
        self.line.done(time.perf_counter() - started)
        end = generation.end
        if end is None:
            return
        self.metrics.prompt_tokens.add(end.prompt_tokens, method=method)
        self.metrics.generated_tokens.add(end.completion_tokens, method=method)
        if end.cancelled:
            self.metrics.cancelled.add(method=method)
        if end.first_token is not None:
            self.metrics.first_token.observe(end.first_token - arrived, method=method)

    async def close(self) -> None:
        """End what is still running and wait until the model is as before."""
        for generation in self._running.values():
            generation.cancel()
        if self._running:
            await asyncio.wait(set(self._running))


def _context(model: Any) -> int | None:
    """Tokens that the language model has positions for, where its configuration says so."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None
