"""Facts about one model that methods need and that must be measured, such as attention-sink dimensions: as files.

They are looked for in this order: built in (published), ``mmfix.json`` in the model's own folder, the user's cache
(written by ``mmfix calibrate``).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmfix.errors import MethodError, MmfixError
from mmfix.families import Family, describe
from mmfix.method import Method
from mmfix.registry import frozen
from mmfix.registry import method as build
from mmfix.storage import write_json

FILE = "mmfix.json"

# (model type, text model type, hidden size, layers, vocabularies) → dimensions with massive activations, as published
# with VAR (arXiv:2503.03321) and its code.
KNOWN_SINKS: tuple[tuple[tuple[str, ...], str, int, int, tuple[int, ...]], ...] = (
    (("llava",), "llama", 4096, 32, (1415, 2533)),
    (("llava",), "llama", 5120, 40, (2100, 4743)),
    (("qwen2_vl",), "qwen2_vl_text", 3584, 28, (458, 2570)),
    (("internvl",), "internlm2", 4096, 32, (3584,)),
    (("internvl_chat",), "internlm2", 4096, 32, (3584,)),
)
# Vicuna's vocabulary, with LLaVA's added tokens and padding; another language model of the same shape differs here.
_VICUNA_VOCABULARIES = range(32000, 32065)


@dataclass(frozen=True)
class SinkCalibration:
    """What ``mmfix calibrate sinks`` found.

    Args:
        sink_dims: hidden dimensions that are massive in attention sinks.
        tau: threshold on phi = |x_d| / RMS(x) that tells sinks from other tokens, at most the paper's 20.
        sink_phi: median phi of the tokens that collect attention.
        other_phi: 99th percentile of phi over the other tokens.
        sinks_per_prompt: mean number of prompt tokens above tau, per layer and prompt.
        image_sinks_per_prompt: how many of them are image tokens. Both are estimates where prompts are long: of tokens
            that are no sinks by their attention, a sample is looked at.
        prompts: prompts looked at.
    """

    sink_dims: tuple[int, ...]
    tau: float
    sink_phi: float
    other_phi: float
    sinks_per_prompt: float
    image_sinks_per_prompt: float
    prompts: int

    @property
    def massive(self) -> bool:
        """Whether sinks stand out: their phi is at least twice that of other tokens. If not, VAR has little to move."""
        return self.sink_phi >= 2 * self.other_phi


def sink_dimensions(family: Family) -> tuple[int, ...]:
    """Sink dimensions of a model.

    Raises:
        MethodError: unknown for this model; the message names the command that finds them.
    """
    kind, text, hidden, layers, vocabulary = family.fingerprint
    for kinds, known_text, known_hidden, known_layers, dims in KNOWN_SINKS:
        vicuna = text != "llama" or vocabulary in _VICUNA_VOCABULARIES
        if kind in kinds and (text, hidden, layers) == (known_text, known_hidden, known_layers) and vicuna:
            return dims
    found = _stored(family.whole).get("sinks")
    if found:
        return tuple(int(d) for d in found["sink_dims"])
    raise MethodError(
        f"the sink dimensions of {model_name(family.whole)!r} are not known; run "
        f"`mmfix calibrate sinks --model {model_name(family.whole)}`, or give var.sink_dims"
    )


def calibrated(model: Any, name: str, **params: Any) -> Method:
    """A method by name with the model's calibrated parameters; `params` given by the caller win."""
    stored: dict[str, Any] = dict(_stored(model).get("methods", {}).get(name, {}))
    fixed = {key: frozen(value) for key, value in stored.items()}
    return build(name, **{**fixed, **params})


def cache_folder() -> Path:
    """Where calibrations are kept: ``$XDG_CACHE_HOME/mmfix`` or ``~/.cache/mmfix``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfix" / "calibration"


def save(
    model: Any, calibration: SinkCalibration, folder: Path | None = None, record: dict[str, Any] | None = None
) -> Path:
    """Write a calibration to the user's cache, or into a model `folder` as ``mmfix.json``; returns the file.

    Args:
        record: how it was made: data, its hash, revision of the model; kept as :func:`keep` does.
    """
    path = folder / FILE if folder is not None else _cache_file(model)
    values = {"sink_dims": list(calibration.sink_dims), "tau": calibration.tau}
    path = _merge(path, model, {"sinks": asdict(calibration)}, "var", values)
    if record is None:
        return path
    scores = {name: value for name, value in asdict(calibration).items() if name not in values}
    return keep(model, "var", values, {**record, "scores": scores}, folder)


def keep(model: Any, name: str, values: dict[str, Any], record: dict[str, Any], folder: Path | None = None) -> Path:
    """Write what was calibrated for one method to the user's cache, or into a model `folder`; returns the file.

    Args:
        values: parameters of the method, as JSON.
        record: how they were found: data, its hash, revision of the model, scores.
    """
    path = folder / FILE if folder is not None else _cache_file(model)
    known = _read(path).get("calibrations", {}) if path.is_file() else {}
    full = {"method": name, "model": Path(model_name(model)).name, **record, "values": values}
    return _merge(path, model, {"calibrations": {**known, name: full}}, name, values)


def in_use(model: Any, method: Method) -> dict[str, Any] | None:
    """Which values of a method are as calibrated for the model, ``{"values": …, "data": …}``; None for none.

    Values that are the method's defaults anyway are told only where all of them are as calibrated. The record's
    ``revision`` is that of the calibrated model; ``model_revision`` stands beside it where the model at hand is known
    to be of another.
    """
    stored = _stored(model)
    known = stored.get("methods", {}).get(method.info.name, {})
    default = {name: one.default for name, one in method.info.params.items()}
    same = {f: value for f, value in known.items() if f in default and frozen(value) == getattr(method, f)}
    used = same if len(same) == len(known) else {f: value for f, value in same.items() if frozen(value) != default[f]}
    record = stored.get("calibrations", {}).get(method.info.name, {})
    told = {name: record[name] for name in ("data", "data_sha256", "revision") if name in record}
    found = {"values": used, **told} if used else method.measured(describe(model))
    if found is None:
        return None
    revision = getattr(model.config, "_commit_hash", None)
    if revision and found.get("revision", revision) != revision:
        found["model_revision"] = revision
    return found


def _merge(path: Path, model: Any, parts: dict[str, Any], name: str, values: dict[str, Any]) -> Path:
    """Write parts of a calibration file and leave its other parts as they are."""
    old = _read(path) if path.is_file() else {}
    methods = {**old.get("methods", {}), name: values}
    return write_json(path, {**old, "model": Path(model_name(model)).name, **parts, "methods": methods})


def model_name(model: Any) -> str:
    """What a model is called in messages, in files, and in the commands that a user is told to run."""
    return str(getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _cache_file(model: Any) -> Path:
    family = describe(model)
    key = hashlib.sha256(json.dumps([model_name(model), *family.fingerprint]).encode()).hexdigest()[:16]
    return cache_folder() / f"{Path(model_name(model)).name}-{key}.json"


def _stored(model: Any) -> dict[str, Any]:
    """What is known of a model: from its own folder and, where that says nothing, from the user's cache."""
    found: dict[str, Any] = {}
    for path in (Path(model_name(model)) / FILE, _cache_file(model)):
        if path.is_file():
            content = _read(path)
            joined = {part: {**content.get(part, {}), **found.get(part, {})} for part in ("methods", "calibrations")}
            found = {**content, **found, **joined}
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MmfixError(f"{path} is not a readable calibration ({error}); delete it and calibrate again") from error
    if not _well_formed(content):
        raise MmfixError(f"{path} does not hold a calibration; delete it and calibrate again")
    return dict(content)


def _well_formed(content: Any) -> bool:
    """Whether a calibration file has the shape that :func:`save` writes; either part may be missing."""
    if not isinstance(content, dict):
        return False
    sinks, chosen = content.get("sinks"), content.get("methods", {})
    if sinks is not None:
        dims = sinks.get("sink_dims") if isinstance(sinks, dict) else None
        if not isinstance(dims, list) or not dims or not all(type(d) is int for d in dims):
            return False
    parts = (chosen, content.get("calibrations", {}))
    return all(isinstance(part, dict) and all(isinstance(one, dict) for one in part.values()) for part in parts)
