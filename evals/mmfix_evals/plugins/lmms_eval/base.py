"""The part that both kinds of lmms-eval models have in common. Imported by lmms-eval only."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms

from mmfix_evals.errors import UsageError
from mmfix_evals.plugins.answering import Answered, Answerer
from mmfix_evals.plugins.lmms_eval.options import translate

LOG = logging.getLogger("mmfix.lmms_eval")
_LOGLIKELIHOOD = (
    "mmfix answers by generating and has no log-likelihood of a given continuation; choose the generative form of the "
    "task (output_type: generate_until)"
)


class MmfixBase(lmms):
    """A vision-language model with a method, for lmms-eval.

    Args:
        pretrained: a bundled name, a local folder or a hub id.
        method: see :class:`mmfix_evals.plugins.answering.Answerer`; semicolons for commas.
        device, dtype, revision: as for ``Decoder.from_pretrained``.
        batch_size: questions per batch.
        seed: seed of sampling, where the task gives none.
        system_prompt: text of a system message before every question, or a file with it.
        max_batch_size: accepted because lmms-eval passes it; only None.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        method: str = "greedy",
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        seed: int = 0,
        system_prompt: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UsageError(f"batch_size={batch_size!r}: give a whole number of at least 1")
        if max_batch_size is not None:
            raise UsageError("max_batch_size is not supported; give batch_size")
        self._distribute(device)
        self._system = self._resolve_system_prompt(system_prompt) if system_prompt else ""
        self.batch_size = int(batch_size)
        self._seed = int(seed)
        self._answerer = Answerer(str(pretrained), str(method), self._wanted, dtype, revision)

    def _distribute(self, device: str | None) -> None:
        """One copy of the model per process that accelerate has started, each on its own GPU."""
        from accelerate import Accelerator

        accelerator = Accelerator()
        self._wanted = device
        if accelerator.num_processes > 1:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
            if torch.cuda.is_available():
                self._wanted = f"cuda:{accelerator.local_process_index}"

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers its counts there."""
        found: torch.device = self._answerer.decoder.model.device
        return found

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refused: see the message."""
        raise NotImplementedError(_LOGLIKELIHOOD)

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refused: see the message."""
        raise NotImplementedError("mmfix answers tasks of one round; choose a task without generate_until_multi_round")

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answers in the order of the requests. An error is an error: no answer is ever left empty because of one."""
        answers: dict[int, Answered] = {}
        fired: dict[str, list[int]] = {}
        for numbers in self._batches(requests):
            stops, options = translate(self._arguments(requests[numbers[0]]), self._seed)
            talks = [self._with_system(self._talk(requests[number].args)) for number in numbers]
            found = self._answerer.many(talks, stops, batch_size=self.batch_size, **options)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
                arguments = requests[number].args
                self.cache_hook.add_partial(
                    "generate_until", (arguments[0], self._arguments(requests[number])), answer.text
                )
            _count(fired, found)
        for name, (acted, considered) in fired.items():
            LOG.warning("%s changed %d of %d places it looked at", name, acted, considered)
        return [_result(answers[number]) for number in range(len(requests))]

    def _batches(self, requests: Sequence[Any]) -> Iterable[list[int]]:
        """Places of requests with equal generation arguments, at most `batch_size` together."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(self._arguments(request), sort_keys=True, default=str), []).append(number)
        for numbers in groups.values():
            for first in range(0, len(numbers), self.batch_size):
                yield numbers[first : first + self.batch_size]

    def _with_system(self, talk: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not self._system:
            return talk
        rest = talk[1:] if talk[0]["role"] == "system" else talk
        return [{"role": "system", "content": self._system}, *rest]

    def _document(self, arguments: Sequence[Any]) -> Any:
        """The document of a request, whose arguments end with its id, task and split in both kinds."""
        doc_id, task, split = arguments[-3:]
        return self.task_dict[task][split][doc_id]

    def _arguments(self, request: Any) -> Mapping[str, Any]:
        raise NotImplementedError

    def _talk(self, arguments: Sequence[Any]) -> list[dict[str, Any]]:
        raise NotImplementedError


def _count(fired: dict[str, list[int]], answers: Sequence[Answered]) -> None:
    """Add what the methods did; answers of one batch share one report."""
    reports = {id(answer.report): answer.report for answer in answers if answer.report}
    for report in reports.values():
        for name, found in (report.get("fired") or {}).items():
            total = fired.setdefault(name, [0, 0])
            total[0] += found["fired"]
            total[1] += found["considered"]


def _result(answer: Answered) -> Any:
    """The answer with its token count, or as plain text for releases of lmms-eval that know no counts."""
    try:
        from lmms_eval.api.instance import GenerationResult, TokenCounts
    except ImportError:
        return answer.text
    counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.output_tokens)
    return GenerationResult(text=answer.text, token_counts=counts)
