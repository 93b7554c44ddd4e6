"""What the plug-ins share: a model with its method, conversations in, answers out."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmfix_decoding import Decoder, TokenEvent
from mmfix_decoding.conversation import conversation
from mmfix_evals.arms import Arm, resolve
from mmfix_evals.serve.stops import Text

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answered:
    """One answer.

    Args:
        text: the answer, cut before the first stop string.
        finish_reason: ``"stop"`` or ``"length"``.
        output_tokens: tokens generated.
        report: what the method did in the call, ``Mitigation.report()`` as a dict; None without a method.
        prompt_tokens: tokens of the prompt, where they were counted.
        events: the tokens, where they were followed one by one.
    """

    text: str
    finish_reason: str
    output_tokens: int
    report: dict[str, Any] | None
    prompt_tokens: int | None = None
    events: list[TokenEvent] = field(default_factory=list)


class Answerer:
    """A model with a method.

    Args:
        model: as for :meth:`mmfix_decoding.Decoder.from_pretrained`; likewise device, dtype and revision.
        method: ``"greedy"``, or a method as on the command line: ``"vhr"``, ``"var:move=0.4;tau=4"``, ``"var+vhr"``.
            A semicolon may stand for each comma, which harnesses take as the end of an argument.

    Raises:
        UnsupportedModel, MethodError, UsageError: as these do.
    """

    def __init__(
        self,
        model: str,
        method: str = "greedy",
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
    ) -> None:
        text = method.strip("\"'").replace(";", ",")
        resolve(text)  # before minutes of loading
        decoder = Decoder.from_pretrained(model, device=device or "auto", dtype=dtype or "auto", revision=revision)
        self.arm: Arm = resolve(text, decoder.model)
        self.decoder = decoder.with_method(list(self.arm.methods) or None)

    def many(
        self, talks: Sequence[Messages], stops: Sequence[str] = (), *, batch_size: int = 1, **options: Any
    ) -> list[Answered]:
        """Answers to several conversations, in order; those of one plain turn are generated in batches.

        Args:
            talks: messages as :meth:`mmfix_decoding.Decoder.chat` takes them.
            stops: stop strings.
            batch_size: conversations per batch.
            **options: of :meth:`mmfix_decoding.Decoder.generate`.
        """
        checked = [conversation(talk) for talk in talks]
        if not all(talk.simple for talk in checked):
            return [self.one(talk, stops, **options) for talk in talks]
        answers = self.decoder.generate(
            [list(talk.sources) for talk in checked],
            [talk.prompt for talk in checked],
            batch_size=batch_size,
            **options,
        )
        return [_cut(answer.text, answer, stops) for answer in answers]

    def one(
        self,
        talk: Messages,
        stops: Sequence[str] = (),
        cancelled: threading.Event | None = None,
        **options: Any,
    ) -> Answered:
        """The answer to one conversation, followed token by token and ended at the first stop string.

        Args:
            talk, stops, options: as for :meth:`many`.
            cancelled: when set, generation ends after the token at hand.
        """
        from transformers import StoppingCriteriaList

        from mmfix_evals.serve.generation import Watch

        watch = Watch(cancelled or threading.Event(), None)
        text, pieces, events = Text(stops), [], list[TokenEvent]()
        with self.decoder.chat(talk, stopping_criteria=StoppingCriteriaList([watch]), **options) as stream:
            for event in stream:
                events.append(event)
                pieces.append(text.add(event.text))
                if text.stopped:
                    break
        pieces.append(text.finish())
        cut = not text.stopped and len(events) >= options.get("max_new_tokens", len(events) + 1)
        reason = "length" if cut else "stop"
        return Answered("".join(pieces), reason, len(events), stream.report, watch.prompt_tokens, events)


def _cut(text: str, answer: Any, stops: Sequence[str]) -> Answered:
    found = Text(stops)
    kept = found.add(text) + found.finish()
    reason = "stop" if found.stopped else answer.finish_reason
    return Answered(kept, reason, len(answer.token_ids), answer.report)
