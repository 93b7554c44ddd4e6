"""Find, check and load a checkpoint: bundled name, local folder or hub id, all through the same two Auto classes."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch

from mmfix.errors import UnsupportedModel, UsageError

_PACKAGE = Path(__file__).resolve().parent
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_CONNECT_SECONDS = 5.0


def bundled() -> list[str]:
    """Names of the models that come with mmfix and load without a network, such as ``["tiny"]``."""
    return sorted(folder.parent.name for folder in _PACKAGE.glob("*/config.json"))


def load(
    name: str | os.PathLike[str],
    device: str | torch.device,
    dtype: str | torch.dtype,
    revision: str | None,
    device_map: str | dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Load model and processor; see :meth:`mmfix_decoding.Decoder.from_pretrained`."""
    if device_map is not None:
        _check_device_map(device)
    target = _device(device)
    source, offline = _locate(name, revision)
    where: dict[str, Any] = {"revision": revision, "local_files_only": offline, "trust_remote_code": False}
    config = _config(str(name), source, where)
    precision = _dtype(dtype, target)

    processor = _processor(str(name), source, where)
    if device_map is not None:
        where = {**where, "device_map": device_map}
    model = _model(str(name), source, where, config, precision)
    return (model if device_map is not None else model.to(target)).eval(), processor


def _check_device_map(device: str | torch.device) -> None:
    if str(device) != "auto":
        raise UsageError(f"device {str(device)!r} and a device_map say two things: give one of them")
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError("a device_map needs accelerate: pip install accelerate")


def _processor(name: str, source: str, where: dict[str, Any]) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source, **where)
    except Exception as error:
        remedy = _remedy(error, "the folder needs its tokenizer and image processor files")
        raise UnsupportedModel(f"cannot load the processor of {name!r}: {_line(error)}; {remedy}") from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UnsupportedModel(
            f"{name!r} has no processor for images and text ({type(processor).__name__} only); add its "
            "processor_config.json or preprocessor_config.json and its tokenizer files"
        )
    return processor


def _model(name: str, source: str, where: dict[str, Any], config: Any, dtype: str | torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the name of a tensor
            **where,
        )
    except Exception as error:
        remedy = _remedy(error, "the model needs complete .safetensors files")
        raise UnsupportedModel(f"cannot load the weights of {name!r}: {_line(error)}; {remedy}") from error
    absent = [*info.get("missing_keys", ()), *(key for key, *_ in info.get("mismatched_keys", ()))]
    if absent:
        raise UnsupportedModel(
            f"the weights of {name!r} lack {len(absent)} tensors of {type(model).__name__}, or have them in another "
            f"shape, such as {sorted(absent)[0]!r}; they would be random: give a complete checkpoint"
        )
    return model


def _remedy(error: Exception, otherwise: str) -> str:
    return "install that library" if isinstance(error, ImportError) else otherwise


def _locate(name: str | os.PathLike[str], revision: str | None) -> tuple[str, bool]:
    """What to hand to transformers for `name`, and whether only local files may be used."""
    text = os.fspath(name)
    if text in bundled():
        return str(_PACKAGE / text), True
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnsupportedModel(
                f"folder {text!r} holds no config.json; give the folder of a saved transformers model"
            )
        return str(folder), True
    if folder.is_file():
        raise UnsupportedModel(f"{text!r} is a file; give the folder of a saved transformers model")
    known = ", ".join(repr(one) for one in bundled()) or "none"
    if not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise UnsupportedModel(
            f"cannot load model {text!r}: no such folder, and not a hub id; give a local folder, a hub id such as "
            f"'llava-hf/llava-1.5-7b-hf' or a bundled model ({known})"
        )
    if _online():
        return text, False
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(text, "config.json", revision=revision), str):
        raise UnsupportedModel(
            f"cannot load model {text!r}: no such folder, not in the local cache, and the hub cannot be reached; give "
            f"a local folder or a bundled model ({known}), or check the name and the connection"
        )
    return text, True


def _online() -> bool:
    """Whether the hub answers; asked once here, because transformers retries every file for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_SECONDS)
    except Exception:  # no name service, refused, timed out, a proxy that answers no
        return False
    return True


def _config(name: str, source: str, where: dict[str, Any]) -> Any:
    """The checkpoint's configuration, checked to be of a model that takes images and text."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        config = AutoConfig.from_pretrained(source, **where)
    except Exception as error:
        if "custom code" in str(error):
            raise UnsupportedModel(
                f"cannot load model {name!r}: it needs code of its own, which mmfix never runs; give a model "
                "that transformers itself supports"
            ) from error
        raise UnsupportedModel(
            f"cannot load model {name!r}: {_line(error)}; check the name and its config.json, or update transformers"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UnsupportedModel(
            f"model {name!r} is of type {config.model_type!r}, which takes no image (not in "
            "AutoModelForImageTextToText); give a vision-language model"
        )
    return config


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except Exception as error:
        raise UsageError(
            f"device {str(device)!r} cannot be used here ({_line(error)}); give 'auto', 'cpu' or 'cuda'"
        ) from error
    return target


def _dtype(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; give one of {', '.join(_DTYPES)}")
    if dtype == "auto":
        # Half precision on a CPU is slow and rounds; float32 holds every bfloat16 and float16 value exactly.
        return torch.float32 if device.type == "cpu" else "auto"
    precision: torch.dtype = getattr(torch, dtype)
    return precision


def _line(error: BaseException) -> str:
    """The gist of a library's error: its first sentence, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text, maxsplit=1)[0].rstrip(".")[:300]
