"""from_pretrained: folders, names, dtypes, and one clear line for everything that cannot be loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_llava import make_tokenizer, picture
from transformers import LlamaConfig, LlamaForCausalLM

import mmfix_decoding
from mmfix.errors import MmfixError, UnsupportedModel, UsageError
from mmfix_decoding import Decoder, bundled, loading


def refusal(model: str | Path, **kwargs: object) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(MmfixError) as caught:
        Decoder.from_pretrained(model, **kwargs)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message or ":" in message
    assert len(message) < 600
    return message


def test_a_folder(folder: Path) -> None:
    for name in (folder, str(folder)):
        decoder = Decoder.from_pretrained(name)
        assert decoder.model_id == str(folder)
        assert decoder.method is None
        assert not decoder.model.training
        assert decoder.generate(picture(0), "dog ?", max_new_tokens=2).tokens


def test_a_relative_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for name in (folder.name, f"./{folder.name}", Path(folder.name)):
        assert Decoder.from_pretrained(name).model_id == os.fspath(name)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert Decoder.from_pretrained(f"~/{folder.name}").model is not None


def test_auto_dtype_is_exact_on_a_cpu(folder: Path) -> None:
    """The folder holds bfloat16."""
    auto = Decoder.from_pretrained(folder, device="cpu").model
    kept = Decoder.from_pretrained(folder, device="cpu", dtype="bfloat16").model
    assert (auto.dtype, kept.dtype) == (torch.float32, torch.bfloat16)
    assert Decoder.from_pretrained(folder, device="cpu", dtype=torch.float64).model.dtype == torch.float64
    for (name, exact), (_, half) in zip(auto.named_parameters(), kept.named_parameters(), strict=True):
        assert torch.equal(exact, half.float()), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_device_and_dtype_on_a_gpu(folder: Path) -> None:
    decoder = Decoder.from_pretrained(folder)
    assert decoder.model.device.type == "cuda"
    assert decoder.model.dtype == torch.bfloat16
    state = torch.cuda.get_rng_state()
    kwargs = {"do_sample": True, "seed": 3, "max_new_tokens": 8}
    answer = decoder.generate(picture(0), "dog ?", **kwargs)
    assert [event.token_id for event in decoder.stream(picture(0), "dog ?", **kwargs)] == answer.token_ids
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_bad_device_and_dtype(folder: Path) -> None:
    for kwargs in ({"device": "gpu"}, {"device": "cuda:99"}, {"dtype": "int8"}, {"dtype": "half"}):
        with pytest.raises(UsageError):
            Decoder.from_pretrained(folder, **kwargs)


def test_what_is_no_model(folder: Path, tmp_path: Path) -> None:
    assert "no such folder, and not a hub id" in refusal(tmp_path / "none")
    assert "no such folder, and not a hub id" in refusal("./none")
    assert "no such folder, and not a hub id" in refusal("a/b/c")
    assert "no such folder, and not a hub id" in refusal("")
    assert "no such folder, and not a hub id" in refusal("two words")
    assert "no config.json" in refusal(tmp_path)
    assert "is a file" in refusal(folder / "config.json")


def test_a_hub_id_without_a_connection_is_refused_soon() -> None:
    start = time.perf_counter()
    for name in ("org/no-such-model", "no-such-model"):
        message = refusal(name)
        assert repr(name) in message
        assert "the hub cannot be reached" in message
        assert "local folder" in message
    assert time.perf_counter() - start < 30


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append((url, timeout))
            raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert "the hub cannot be reached" in refusal("org/no-such-model")
    assert len(asked) == 1
    assert asked[0][1] <= 10


def broken(folder: Path, target: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(folder, target)
    change(target)
    return target


def edit_config(**values: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def drop_a_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    del tensors[
        "language_model.model.norm.weight" if "language_model.model.norm.weight" in tensors else sorted(tensors)[0]
    ]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def shorten(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) // 2])

    return change


def only_pickles(path: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def own_code(path: Path) -> None:
    """A checkpoint that brings code: it must be refused without asking and without running it."""
    auto = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model", "AutoProcessor": "code.Processor"}
    edit_config(model_type="invented", auto_map=auto)(path)
    (path / "code.py").write_text("raise SystemExit('code of a checkpoint was run')\n")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "config cut": (shorten("config.json"), "config.json"),
    "unknown type": (edit_config(model_type="invented"), "invented"),
    "own code": (own_code, "never runs"),
    "weights cut": (shorten("model.safetensors"), "weights"),
    "weights missing": (lambda p: (p / "model.safetensors").unlink(), "weights"),
    "pickles only": (only_pickles, "weights"),
    "tensor missing": (drop_a_weight, "would be random"),
    "other shape": (
        edit_config(vision_feature_layer=[-2, -1]),
        "another shape",
    ),
    "no processor": (lambda p: (p / "processor_config.json").unlink(), "processor"),
    "processor cut": (shorten("processor_config.json"), "processor"),
    "tokenizer cut": (shorten("tokenizer.json"), "processor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(folder: Path, tmp_path: Path, name: str) -> None:
    change, words = BROKEN[name]
    path = broken(folder, tmp_path / "copy", change)
    message = refusal(path)
    assert words in message
    assert "copy" in message


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=27, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "'llama'" in message
    assert "takes no image" in message


HUB = """
import sys, time
from mmfix_decoding import Decoder
decoder = Decoder.from_pretrained("org/model")
print(decoder.model_id, decoder.generate(sys.argv[1], "dog ?", max_new_tokens=4).token_ids)
"""


@pytest.mark.slow
def test_a_hub_model_in_the_cache_takes_the_same_path(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--model"
    commit = "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    picture(0).save(tmp_path / "one.png")
    environment = os.environ | {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(tmp_path / "one.png")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    expected = Decoder.from_pretrained(folder, device="auto").generate(picture(0), "dog ?", max_new_tokens=4).token_ids
    assert done.stdout.strip() == f"org/model {expected}", done.stderr


# -- bundled ----------------------------------------------------------------------------------------------------------


def test_bundled_names_are_folders_of_the_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_PACKAGE", tmp_path)
    assert bundled() == []
    shutil.copytree(folder, tmp_path / "pocket")
    (tmp_path / "notes").mkdir()
    assert bundled() == ["pocket"]
    decoder = Decoder.from_pretrained("pocket")
    assert decoder.model_id == "pocket"
    assert decoder.generate(picture(0), "dog ?", max_new_tokens=2).token_ids
    assert "'pocket'" in refusal("org/none")


TINY = Path(mmfix_decoding.__file__).parent / "tiny"
needs_tiny = pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the bundled model is not here")


@needs_tiny
def test_the_bundled_model() -> None:
    from PIL import Image

    assert "tiny" in bundled()
    decoder = Decoder.from_pretrained("tiny")
    images = [Image.new("RGB", (96, 96), color) for color in ("green", "gray", "blue")]
    prompt = "Please describe this image in detail."
    answers = decoder.generate(images, prompt, max_new_tokens=24)
    alone = [decoder.generate(image, prompt, max_new_tokens=24) for image in images]
    assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
    assert all(a.text for a in answers)
    events = list(decoder.stream(images[0], prompt, max_new_tokens=24))
    assert "".join(event.text for event in events).strip() == answers[0].text
    mixed = decoder.generate(images[0], [prompt, "Is there a car in the image?"], max_new_tokens=24)
    assert mixed[0].token_ids == answers[0].token_ids
    calibrated = (TINY / "mmfix.json").is_file()
    for method in ("vhr", "var") if calibrated else ("vhr",):
        report = decoder.with_method(method).generate(images[0], prompt, max_new_tokens=8).report
        assert report is not None
        assert report["methods"][0]["name"] == method


@needs_tiny
def test_a_copy_of_the_bundled_model_is_the_bundled_model(tmp_path: Path) -> None:
    """Nothing is special about it but its name."""
    shutil.copytree(TINY, tmp_path / "copy")
    prompt = "Is there a person in the image?"
    answers = [Decoder.from_pretrained(n).generate(picture(0), prompt) for n in ("tiny", tmp_path / "copy")]
    assert answers[0].token_ids == answers[1].token_ids


def test_unsupported_is_an_mmfix_error() -> None:
    assert issubclass(UnsupportedModel, MmfixError)


def test_a_device_map_reaches_transformers_and_the_model_is_not_moved(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText

    original, seen = AutoModelForImageTextToText.from_pretrained, []

    def from_pretrained(*args: object, device_map: object = None, **kwargs: object) -> object:
        seen.append(device_map)
        model, info = original(*args, **kwargs)
        model.to = None  # a model that is spread over devices must not be moved
        return model, info

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    assert Decoder.from_pretrained(folder, device_map="auto").generate(picture(0), "Hello", max_new_tokens=2).text != ""
    assert seen == ["auto"]
    assert "say two things" in refusal(folder, device="cpu", device_map="auto")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    assert "pip install accelerate" in refusal(folder, device_map="auto")
