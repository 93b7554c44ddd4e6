"""Generation arguments: what the decoder decides, what it passes on, what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import mmfix
from mmfix.errors import UsageError
from mmfix_decoding.prompts import pad_token

BATCH_SIZE = 16

# Arguments of model.generate() that the decoder sets itself, with what to do instead.
_RESERVED = {
    **dict.fromkeys(
        ("inputs", "input_ids", "inputs_embeds", "attention_mask", "pixel_values"), "give image and prompt"
    ),
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        "use stream() for log-probabilities, or call decoder.model.generate yourself",
    ),
    "max_length": "use max_new_tokens",
    "streamer": "use stream()",
    "custom_generate": "call decoder.model.generate yourself",
}


@dataclass(frozen=True)
class Plan:
    """Checked arguments of one call.

    Args:
        kwargs: for ``model.generate``.
        sampling: whether tokens are drawn.
        seed: the call's seed, or None.
        batch_size: requests per batch.
        stop_ids: ids that end an answer.
        pad_id: id of padding.
        max_new_tokens: limit on the tokens of one answer.
    """

    kwargs: dict[str, Any]
    sampling: bool
    seed: int | None
    batch_size: int
    stop_ids: frozenset[int]
    pad_id: int | None
    max_new_tokens: int


def plan(
    model: Any, processor: Any, max_new_tokens: int, seed: int | None, batch_size: int | None, kwargs: dict[str, Any]
) -> Plan:
    """Check the arguments of a call and fill in the defaults.

    Raises:
        UsageError: a number out of its range or an argument that the decoder sets itself.
    """
    _whole("max_new_tokens", max_new_tokens, 1)
    if batch_size is not None:
        _whole("batch_size", batch_size, 1)
    if seed is not None:
        _whole("seed", seed, 0)
    for name, remedy in _RESERVED.items():
        if name in kwargs:
            raise UsageError(f"generate() does not take {name}; {remedy}")
    if kwargs.get("num_return_sequences", 1) != 1:
        raise UsageError("num_return_sequences must be 1; call generate once per seed for several answers")

    config = kwargs.get("generation_config") or model.generation_config
    kwargs = dict(kwargs, max_new_tokens=max_new_tokens)
    if kwargs.get("stop_strings") is not None:
        kwargs.setdefault("tokenizer", processor.tokenizer)
    if "do_sample" not in kwargs and "generation_config" not in kwargs:
        kwargs["do_sample"] = False
    sampling = bool(kwargs.get("do_sample", config.do_sample))
    pad_id = _fill(kwargs, "pad_token_id", config, pad_token(processor))
    stop = _fill(kwargs, "eos_token_id", config, processor.tokenizer.eos_token_id)
    stop_ids = frozenset() if stop is None else frozenset(stop if isinstance(stop, (list, tuple)) else [stop])
    if sampling and seed is not None:
        batch_size = 1  # one request per draw: neither its neighbours nor its place can change it
    elif processor.tokenizer.pad_token_id is None:
        batch_size = 1
    seed = None if seed is None else int(seed)
    return Plan(kwargs, sampling, seed, batch_size or BATCH_SIZE, stop_ids, pad_id, max_new_tokens)


def _fill(kwargs: dict[str, Any], name: str, config: Any, default: Any) -> Any:
    """The value of a token id that is in force, passed on explicitly where the checkpoint leaves it open."""
    if kwargs.get(name) is None and getattr(config, name, None) is None and default is not None:
        kwargs[name] = default
    value = kwargs.get(name)
    return value if value is not None else getattr(config, name, None)


def _whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
        raise UsageError(f"{name}={value!r} is not a whole number of at least {low}; give one")


def refuse_unsettled(model: Any, chosen: Plan, method: Any = None) -> None:
    """Raise UsageError for decoding that does not settle one token at a time, which a stream cannot follow."""
    for one in method if isinstance(method, (list, tuple)) else [method] if method else []:
        built = mmfix.calibrated(model, one) if isinstance(one, str) else one
        if built.search() is not None:
            raise UsageError(
                f"stream() cannot follow {built.info.name}, a search that settles no token before its end; use "
                "generate()"
            )
    config = chosen.kwargs.get("generation_config") or model.generation_config
    if (chosen.kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1) > 1:
        raise UsageError("stream() cannot follow a beam search, which settles no token before its end; use num_beams=1")
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if chosen.kwargs.get(name) is not None:
            raise UsageError(f"stream() cannot follow assisted decoding; leave {name} out, or use generate()")
