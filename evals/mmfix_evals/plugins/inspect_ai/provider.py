"""The provider. Imported by inspect_ai only."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
import threading
import time
from typing import Any

import anyio.to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from mmfix_evals.errors import UsageError
from mmfix_evals.plugins.answering import Answered, Answerer

MAX_TOKENS = 512
_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")
# Settings that would change the answer and have no counterpart here.
_UNSUPPORTED = (
    "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "top_logprobs", "prompt_logprobs",
    "response_schema", "modalities", "reasoning_tokens", "effort", "verbosity", "extra_body", "internal_tools",
    "fallback_models",
)  # fmt: skip


class MmfixAPI(ModelAPI):
    """A vision-language model with a method, for inspect_ai. One answer is generated at a time.

    Args:
        model_name: a bundled name, a local folder or a hub id.
        config: inspect_ai's settings.
        method: see :class:`mmfix_evals.plugins.answering.Answerer`.
        device, dtype, revision: as for ``Decoder.from_pretrained``.
        base_url, api_key: accepted because inspect_ai passes them; not used.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        method: str = "greedy",
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self._answerer = Answerer(model_name, str(method), device, dtype, revision)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a conversation.

        Raises:
            UsageError: tools, or a setting that has no counterpart here.
        """
        if tools:
            raise UsageError("mmfix models call no tools; use a task without them")
        options, stops = _options(config)
        talk = [{"role": _role(message), "content": _content(message)} for message in input]
        cancelled = threading.Event()
        start = time.perf_counter()
        try:
            answer = await anyio.to_thread.run_sync(
                lambda: self._answerer.one(talk, stops, cancelled, **options), abandon_on_cancel=True
            )
        finally:
            cancelled.set()  # ends the generation where inspect_ai gave up waiting
        return self._output(answer, time.perf_counter() - start, bool(config.logprobs))

    def max_connections(self) -> int:
        """Generations at a time: the model is one."""
        return 1

    def connection_key(self) -> str:
        """Connections are counted per model and method."""
        return f"{self.model_name} {self._answerer.arm.name}"

    def _output(self, answer: Answered, seconds: float, logprobs: bool) -> ModelOutput:
        read = answer.prompt_tokens or 0
        choice = ChatCompletionChoice(
            message=ChatMessageAssistant(content=answer.text, model=self.model_name, source="generate"),
            stop_reason="max_tokens" if answer.finish_reason == "length" else "stop",
            logprobs=self._logprobs(answer) if logprobs else None,
        )
        return ModelOutput(
            model=self.model_name,
            choices=[choice],
            usage=ModelUsage(
                input_tokens=read, output_tokens=answer.output_tokens, total_tokens=read + answer.output_tokens
            ),
            time=seconds,
            metadata={
                "method": self._answerer.arm.name,
                "methods": list(self._answerer.arm.spec),
                "fired": (answer.report or {}).get("fired") or {},
            },
        )

    def _logprobs(self, answer: Answered) -> Logprobs:
        tokenizer = self._answerer.decoder.processor.tokenizer
        return Logprobs(
            content=[Logprob(token=tokenizer.decode([one.token_id]), logprob=one.logprob) for one in answer.events]
        )


def _options(config: GenerateConfig) -> tuple[dict[str, Any], list[str]]:
    """Arguments of the decoder, and stop strings. Without a temperature, or at 0, decoding is greedy."""
    for name in _UNSUPPORTED:
        if getattr(config, name, None) not in (None, 0, {}, []):
            raise UsageError(f"mmfix models do not support the setting {name}; leave it out")
    if (config.num_choices or 1) != 1:
        raise UsageError("mmfix models give one choice; use epochs for several answers")
    options: dict[str, Any] = {"max_new_tokens": config.max_tokens or MAX_TOKENS, "do_sample": False}
    if config.temperature:
        seed = secrets.randbits(62) if config.seed is None else config.seed
        options |= {"do_sample": True, "temperature": config.temperature, "seed": seed}
        options |= {"top_p": 1.0 if config.top_p is None else config.top_p, "top_k": config.top_k or 0}
    return options, list(config.stop_seqs or ())


def _role(message: ChatMessage) -> str:
    if message.role not in ("system", "user", "assistant"):
        raise UsageError(f"mmfix models take no messages of role {message.role!r}; use a task without tools")
    return str(message.role)


def _content(message: ChatMessage) -> Any:
    if isinstance(message.content, str):
        return message.content
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if part.type == "text":
            parts.append({"type": "text", "text": part.text})
        elif part.type == "image":
            parts.append({"type": "image", "image": _image(part.image)})
        elif part.type != "reasoning":
            raise UsageError(f"mmfix models take texts and pictures, not {part.type!r}; use an image task")
    return parts


def _image(image: str) -> str | bytes:
    """A path as it is, the bytes of a data URL; a remote URL is refused by the decoder, with a remedy."""
    found = _DATA.match(image)
    if not found:
        return image
    try:
        return base64.b64decode(image[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError("an image of the task is not valid base64; encode it again") from error
