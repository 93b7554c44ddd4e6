"""From images and prompts, one or many, to the tensors of one batch."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from mmfix.errors import ImageError, MmfixError, UnsupportedModel, UsageError
from mmfix_decoding.conversation import Conversation, PromptTooLong, render
from mmfix_decoding.images import ImageSource, load_image

ImageInput: TypeAlias = "ImageSource | Sequence[ImageSource | None] | Sequence[Sequence[ImageSource]] | None"


@dataclass(frozen=True)
class Request:
    """One prompt with its images.

    Args:
        prompt: the user's text.
        sources: the images before the text, in order; usually one, none for a prompt without a picture.
        place: how messages name this request in a call with many; empty in a call with one.
        talk: the whole conversation, where there is more than the one prompt.
    """

    prompt: str
    sources: tuple[ImageSource, ...]
    place: str = ""
    images: tuple[Image.Image, ...] = field(default=(), repr=False)
    talk: Conversation | None = None

    def load(self) -> Request:
        """The same request with its images decoded."""
        try:
            return replace(self, images=tuple(load_image(s) for s in self.sources))
        except ImageError as error:
            if not self.place:
                raise
            raise ImageError(f"{self.place}: {error}") from error

    def digest(self) -> bytes:
        """SHA-256 of the prompt and the decoded pixels: equal requests have equal digests, wherever they stand."""
        text = (self.prompt if self.talk is None else self.talk.canonical()).encode()
        sha = hashlib.sha256(len(text).to_bytes(8, "big") + text)
        for image in self.images:
            sha.update(b"%d x %d;" % image.size)
            sha.update(image.tobytes())
        return sha.digest()


def pair(image: ImageInput, prompt: str | Sequence[str]) -> tuple[list[Request], bool]:
    """Match images with prompts.

    One image goes with every prompt of a list, one prompt with every image of a list, two lists of one length pair up;
    an element of the image list that is itself a list holds several images of one prompt.

    Returns:
        The requests in order, and whether the answer is a list (True when either argument is one).

    Raises:
        UsageError: lists of different lengths, an empty prompt, or a prompt that is no text.
    """
    prompts = list(prompt) if isinstance(prompt, (list, tuple)) else None
    images = list(image) if isinstance(image, (list, tuple)) else None
    if prompts is not None and images is not None and len(prompts) != len(images):
        raise UsageError(
            f"{len(images)} images and {len(prompts)} prompts do not pair up; give lists of one length, or one image "
            "(not in a list) for all prompts, or one prompt for all images"
        )
    count = len(prompts) if prompts is not None else len(images) if images is not None else 1
    many = prompts is not None or images is not None
    requests = []
    for n in range(count):
        place = f"item {n} of {count}" if many else ""
        text = _checked(prompts[n] if prompts is not None else prompt, place)
        requests.append(Request(text, _sources(images[n] if images is not None else image), place))
    return requests, many


def single(image: Any, prompt: Any) -> Request:
    """One prompt with its image, its list of images, or None; errors as for :func:`pair`."""
    return Request(_checked(prompt, ""), _sources(image))


def _sources(image: Any) -> tuple[ImageSource, ...]:
    return () if image is None else tuple(image) if isinstance(image, (list, tuple)) else (image,)


def load_images(requests: Sequence[Request]) -> list[Request]:
    """The requests with their images decoded; neighbours that name the same sources share the pictures."""
    loaded: list[Request] = []
    for request in requests:
        before = loaded[-1] if loaded else None
        if before is not None and _same(before.sources, request.sources):
            loaded.append(replace(request, images=before.images))
        else:
            loaded.append(request.load())
    return loaded


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(
        a is b or (isinstance(a, str) and a == b) for a, b in zip(left, right, strict=True)
    )


def _checked(prompt: Any, place: str) -> str:
    where = f"the prompt of {place}" if place else "the prompt"
    if not isinstance(prompt, str):
        raise UsageError(f"{where} is a {type(prompt).__name__}; give a string")
    if not prompt.strip():
        raise UsageError(
            f'{where} is empty; give a question or an instruction, such as "Please describe this image in detail."'
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} is not valid Unicode ({error.reason} at {error.start}); remove the lone surrogate"
        ) from error
    return prompt


def encode(requests: Sequence[Request], processor: Any, model: Any) -> dict[str, Tensor]:
    """Tensors of one left-padded batch, on the model's device and in its dtype.

    The processor's chat template renders one user turn: the images, then the text. A processor without a template
    gets its image token once per image, a line break and the text (through the tokenizer's template if that has one).

    Raises:
        UsageError: a prompt holds the model's image token.
        UnsupportedModel: the template leaves the image out, or the processor does not pad on the left.
    """
    texts = [_render(request, processor) for request in requests]
    options: dict[str, Any] = {"return_tensors": "pt", "padding": len(texts) > 1}
    if len(texts) > 1:
        options["padding_side"] = "left"
    bos = getattr(processor.tokenizer, "bos_token", None)
    if bos and all(text.startswith(bos) for text in texts):
        options["add_special_tokens"] = False  # the template wrote it already
    nested = [list(request.images) for request in requests]
    inputs = processor(text=texts, images=nested if any(nested) else None, **options)
    inputs = inputs.to(model.device, dtype=model.dtype)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if "token_type_ids" in tensors and "token_type_ids" not in inspect.signature(model.forward).parameters:
        del tensors["token_type_ids"]
    _verify(tensors, requests, model)
    return tensors


def _render(request: Request, processor: Any) -> str:
    token = image_token(processor)
    if request.talk is not None and not request.talk.simple:
        return render(request.talk, processor, token)
    if token and token in request.prompt:
        where = f"the prompt of {request.place}" if request.place else "the prompt"
        raise UsageError(f"{where} holds the image token {token!r}; leave it out: the decoder places the images itself")
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"} for _ in request.images] + [{"type": "text", "text": request.prompt}]
        messages = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    text = f"{(token or '') * len(request.images)}\n{request.prompt}".lstrip("\n")
    if getattr(processor.tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        return str(processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    return text


def image_token(processor: Any) -> str | None:
    """The text that stands for one image in a prompt, if the processor names one."""
    token = getattr(processor, "image_token", None)
    return str(token) if token else None


def _verify(inputs: dict[str, Tensor], requests: Sequence[Request], model: Any) -> None:
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    if mask is not None and not bool(mask[:, -1].all()):
        raise UnsupportedModel(
            f"the processor of {type(model).__name__} does not pad on the left; call generate with batch_size=1"
        )
    for request in requests:
        if request.talk is not None and request.talk.limit is not None and ids.shape[1] > request.talk.limit:
            raise PromptTooLong(ids.shape[1], request.talk.limit)
    config = model.config
    token_id = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if token_id is None:
        return
    shown = (ids == token_id).any(1)
    expected = torch.tensor([bool(request.images) for request in requests], device=ids.device)
    if bool((expected & ~shown).any()):
        raise UnsupportedModel(
            f"the prompt of {type(model).__name__} holds no image token (id {token_id}) after processing; "
            "check the processor's chat template"
        )


def pad_token(processor: Any) -> int | None:
    """Id of the padding token; a tokenizer without one pads with its end token from now on.

    Raises:
        MmfixError: the processor holds no tokenizer.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise MmfixError(f"{type(processor).__name__} has no tokenizer; load it with AutoProcessor.from_pretrained")
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return None if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
