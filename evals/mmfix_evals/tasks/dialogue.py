"""Several turns about one picture: each question is asked with the earlier questions and the model's own answers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmfix_evals.errors import UsageError


@dataclass
class Dialogue:
    """The answers of one conversation, in the shape of one answer.

    Attributes:
        replies: one text per turn.
        token_ids: of all turns.
        report: the engine's, of the last turn; its counts cover all turns.
    """

    replies: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "stop"
    seconds: float = 0.0
    report: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """The replies as a JSON list, so that the raw texts are kept apart."""
        return json.dumps(self.replies, ensure_ascii=False)


def replies(response: str) -> list[str]:
    """The texts of a stored dialogue."""
    return [str(text) for text in json.loads(response)]


def converse(
    decoder: Any,
    questions: Sequence[Sequence[str]],
    pictures: Sequence[Any],
    *,
    seed: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int = 128,
    **kwargs: Any,
) -> list[Dialogue]:
    """Ask every conversation turn by turn; the picture stands in the first turn, and every turn reads all before it.

    Args:
        decoder: a :class:`mmfix_decoding.Decoder`; its method acts in every turn.
        questions: one list per conversation, all of one length.
        pictures: one per conversation.
        seed, batch_size, max_new_tokens, kwargs: as for ``decoder.generate``; no sampling.

    Raises:
        UsageError: sampling, or conversations of different length.
    """
    import mmfix
    from mmfix_decoding import options
    from mmfix_decoding.answer import cut

    turns = {len(asked) for asked in questions}
    if len(turns) != 1:
        raise UsageError(f"conversations of {sorted(turns)} turns in one batch; give conversations of one length")
    chosen = options.plan(decoder.model, decoder.processor, max_new_tokens, seed, batch_size, kwargs)
    if chosen.sampling:
        raise UsageError("questions in several turns are asked greedily or with beams: leave do_sample out")
    found = [Dialogue() for _ in questions]
    with mmfix.mitigate(decoder.model, decoder.method) as fix:
        for turn in range(turns.pop()):
            texts = [
                render(decoder.processor, asked, one.replies, turn) for asked, one in zip(questions, found, strict=True)
            ]
            inputs = encode(decoder, texts, pictures)
            start = time.perf_counter()
            rows = decoder.model.generate(**inputs, **chosen.kwargs).tolist()
            seconds = (time.perf_counter() - start) / len(found)
            for one, row in zip(found, rows, strict=True):
                ids, reason = cut(row[inputs["input_ids"].shape[1] :], chosen.stop_ids, chosen.pad_id, max_new_tokens)
                one.replies.append(decoder.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
                one.token_ids += ids
                one.finish_reason = reason if reason == "length" else one.finish_reason
                one.seconds += seconds
        report = fix.report().to_dict() if decoder.method is not None else None
    for one in found:
        one.report = report
    return found


def render(processor: Any, asked: Sequence[str], answered: Sequence[str], turn: int) -> str:
    """The conversation up to a turn, by the processor's chat template."""
    if not getattr(processor, "chat_template", None):
        raise UsageError("questions in several turns need a processor with a chat template; use the single-turn task")
    messages = []
    for n in range(turn + 1):
        picture = [{"type": "image"}] if n == 0 else []
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": asked[n]}]})
        if n < turn:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answered[n]}]})
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def encode(decoder: Any, texts: list[str], pictures: Sequence[Any]) -> dict[str, Any]:
    """Tensors of one left-padded batch, as the decoder itself makes them."""
    processor, model = decoder.processor, decoder.model
    options: dict[str, Any] = {"return_tensors": "pt", "padding": len(texts) > 1}
    if len(texts) > 1:
        options["padding_side"] = "left"
    bos = getattr(processor.tokenizer, "bos_token", None)
    if bos and all(text.startswith(bos) for text in texts):
        options["add_special_tokens"] = False
    inputs = processor(text=texts, images=[[picture] for picture in pictures], **options)
    return dict(inputs.to(model.device, dtype=model.dtype))
