"""lmms-eval's generation arguments in the decoder's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmfix_evals.errors import UsageError

MAX_NEW_TOKENS = 128
# They change nothing for a model that goes through its own processor.
_IGNORED = frozenset({"image_aspect_ratio", "use_cache", "skip_special_tokens"})
_PASSED = frozenset({"num_beams", "repetition_penalty", "length_penalty", "min_new_tokens"})
_KNOWN = frozenset(
    {"max_new_tokens", "max_gen_toks", "temperature", "top_p", "top_k", "do_sample", "until", "stop_sequences", "seed"}
)


def translate(given: Mapping[str, Any], seed: int) -> tuple[list[str], dict[str, Any]]:
    """Stop strings, and arguments of :meth:`mmfix_decoding.Decoder.generate`.

    A temperature above 0 samples unless ``do_sample`` is false; without one, ``do_sample`` decides.

    Args:
        given: the task's ``generation_kwargs``.
        seed: seed where the task gives none.

    Raises:
        UsageError: an argument that is not known here, and would otherwise silently do nothing.
    """
    values = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(set(values) - _KNOWN - _PASSED - _IGNORED)
    if unknown:
        raise UsageError(
            f"generation argument {unknown[0]!r} of the task is not supported by mmfix; override it with --gen_kwargs"
        )
    temperature = float(values.get("temperature", 1.0 if values.get("do_sample") else 0.0))
    options: dict[str, Any] = {name: values[name] for name in _PASSED & set(values)}
    options["max_new_tokens"] = int(values.get("max_new_tokens", values.get("max_gen_toks", MAX_NEW_TOKENS)))
    options["seed"] = int(values.get("seed", seed))
    options["do_sample"] = temperature > 0 and bool(values.get("do_sample", True))
    if options["do_sample"]:
        options |= {
            "temperature": temperature,
            "top_p": float(values.get("top_p", 1.0)),
            "top_k": values.get("top_k", 0),
        }
    return _strings(values.get("until")) + _strings(values.get("stop_sequences")), options


def _strings(value: Any) -> list[str]:
    found = [] if value is None else [value] if isinstance(value, str) else list(value)
    if not all(isinstance(one, str) for one in found):
        raise UsageError(f"until={value!r}: give a string or a list of strings")
    return [one for one in found if one]
