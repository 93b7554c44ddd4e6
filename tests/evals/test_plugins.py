"""The harness plug-ins, against stand-ins of the harnesses' interfaces and, where installed, the real ones."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pytest
import torch
from PIL import Image
from serving import PICTURE, PROMPT, data_url

from mmfix_decoding import Decoder
from mmfix_evals.errors import UsageError
from mmfix_evals.plugins.lmms_eval.manifest import manifests
from mmfix_evals.plugins.lmms_eval.options import translate

OURS = "mmfix_evals.plugins."
GREEDY = {"max_new_tokens": 24, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_pretrained("tiny")


@pytest.fixture(scope="module")
def answers(decoder: Decoder) -> dict[str, str]:
    """Of the decoder itself, by method."""
    return {
        name: decoder.with_method(name if name != "greedy" else None).generate(PICTURE, PROMPT, max_new_tokens=24).text
        for name in ("greedy", "vhr")
    }


def stand_in_lmms_eval() -> dict[str, types.ModuleType]:
    """The parts of lmms-eval 0.7 that the plug-in touches."""

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    class Hook:
        def __init__(self) -> None:
            self.kept: list[Any] = []

        def add_partial(self, name: str, request: Any, answer: Any) -> None:
            self.kept.append((name, request, answer))

    class lmms:  # noqa: N801
        is_simple = True

        def __init__(self) -> None:
            self._rank, self._world_size = 0, 1
            self.cache_hook = Hook()
            self.task_dict: dict[str, Any] = {}

        @staticmethod
        def _resolve_system_prompt(value: str) -> str:
            return value

        @classmethod
        def create_from_arg_string(cls, text: str, more: dict[str, Any]) -> Any:
            given = dict(one.split("=", 1) for one in text.split(","))
            return cls(**given, **{name: value for name, value in more.items() if value is not None})

    @dataclass
    class TokenCounts:
        input_tokens: int | None = None
        output_tokens: int | None = None

    @dataclass
    class GenerationResult:
        text: str
        token_counts: Any = None

    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.models", "lmms_eval.api.model", "lmms_eval.api.instance")
    modules = {name: types.ModuleType(name) for name in (*names, "lmms_eval.models.registry_v2", "accelerate")}
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest  # type: ignore[attr-defined]
    modules["lmms_eval.api.model"].lmms = lmms  # type: ignore[attr-defined]
    modules["lmms_eval.api.instance"].GenerationResult = GenerationResult  # type: ignore[attr-defined]
    modules["lmms_eval.api.instance"].TokenCounts = TokenCounts  # type: ignore[attr-defined]
    modules["accelerate"].Accelerator = lambda: types.SimpleNamespace(num_processes=1)  # type: ignore[attr-defined]
    return modules


def forget() -> None:
    for name in [name for name in sys.modules if name.startswith(OURS) and name.rpartition(".")[2] in
                 ("base", "simple", "chat", "registry", "provider")]:  # fmt: skip
        del sys.modules[name]


KINDS = [
    "stand-in",
    pytest.param(
        "real", marks=pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="lmms-eval not installed")
    ),
]


@pytest.fixture(params=KINDS)
def lmms_eval(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """lmms-eval as a stand-in, or the real one."""
    forget()
    if request.param == "stand-in":
        for name, module in stand_in_lmms_eval().items():
            monkeypatch.setitem(sys.modules, name, module)
    yield request.param
    forget()


def load(path: str) -> type[Any]:
    module, _, name = path.rpartition(".")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


def instance(*args: Any) -> Any:
    return types.SimpleNamespace(args=args)


def text_of(result: Any) -> str:
    return result if isinstance(result, str) else str(result.text)


DOCUMENTS = [{"n": n, "question": PROMPT if n != 1 else "Is there a dog in the image?"} for n in range(3)]


def picture(document: Any) -> list[Image.Image]:
    return [Image.open(PICTURE).convert("RGB")]


def test_simple(lmms_eval: str, answers: dict[str, str], decoder: Decoder) -> None:
    (manifest,) = manifests()
    cls = load(manifest.simple_class_path)
    model = cls.create_from_arg_string("pretrained=tiny,method=vhr", {"batch_size": 2, "device": "cpu"})
    assert model.is_simple
    assert (model.rank if lmms_eval == "real" else model._rank, model.device) == (0, torch.device("cpu"))
    model.task_dict = {"t": {"test": DOCUMENTS}}
    kwargs = [GREEDY, GREEDY, {**GREEDY, "max_new_tokens": 3}]
    requests = [instance(d["question"], kwargs[d["n"]], picture, d["n"], "t", "test") for d in DOCUMENTS]
    found = model.generate_until(requests)
    assert text_of(found[0]) == answers["vhr"]
    assert text_of(found[1]) in ("yes", "no")
    assert answers["vhr"].startswith(text_of(found[2]))
    assert found[2].token_counts.output_tokens == 3
    stopped = model.generate_until([instance(PROMPT, {**GREEDY, "until": [" and"]}, picture, 0, "t", "test")])
    assert text_of(stopped[0]) == answers["vhr"].split(" and")[0]
    placed = [instance(f"<image>\n{PROMPT}", GREEDY, picture, 0, "t", "test")]
    assert text_of(model.generate_until(placed)[0]) == answers["vhr"]
    if lmms_eval == "stand-in":
        assert ("generate_until", (PROMPT, GREEDY), answers["vhr"]) in model.cache_hook.kept
    with pytest.raises(NotImplementedError, match="generative form of the task"):
        model.loglikelihood(requests)
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round(requests)
    with pytest.raises(UsageError, match="gives a dict"):
        model.generate_until([instance(PROMPT, GREEDY, lambda document: [{"array": 1}], 0, "t", "test")])


def test_chat(lmms_eval: str, answers: dict[str, str], decoder: Decoder) -> None:
    (manifest,) = manifests()
    cls = load(manifest.chat_class_path)
    model = cls.create_from_arg_string("pretrained=tiny,method=vhr:alpha=2.0;drop_outliers=true", {"batch_size": 3})
    assert not model.is_simple
    model.task_dict = {"t": {"test": DOCUMENTS}}

    def messages(document: Any) -> list[dict[str, Any]]:
        shown = {"type": "image", "url": picture(document)[0]}
        asked = {"role": "user", "content": [shown, {"type": "text", "text": document["question"]}]}
        if document["n"] < 2:
            return [asked]
        said = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
        return [asked, said, {"role": "user", "content": [{"type": "text", "text": "is there a cat?"}]}]

    requests = [instance("", messages, GREEDY, n, "t", "test") for n in (0, 1)]
    found = model.generate_until(requests)
    assert text_of(found[0]) == answers["vhr"]
    assert text_of(found[1]) in ("yes", "no")
    shorter = model.generate_until([instance(messages, GREEDY, 0, "t", "test")])  # releases without the context
    assert text_of(shorter[0]) == answers["vhr"]
    several = text_of(model.generate_until([instance("", messages, GREEDY, 2, "t", "test")])[0])
    talk = [
        {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": PROMPT}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "is there a cat?"},
    ]
    events = decoder.with_method("vhr").chat(talk, max_new_tokens=24)
    assert several == "".join(event.text for event in events).strip().split("\n\n")[0]
    film = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(UsageError, match="'video'"):
        model.generate_until([instance("", lambda document: film, GREEDY, 0, "t", "test")])


def test_lmms_eval_arguments() -> None:
    assert translate({"until": "a", "max_new_tokens": 5}, 7) == (
        ["a"], {"max_new_tokens": 5, "seed": 7, "do_sample": False},
    )  # fmt: skip
    assert translate({"temperature": 0.5, "top_p": None}, 7)[1]["do_sample"]
    assert translate({"do_sample": True}, 7)[1]["temperature"] == 1.0
    assert not translate({"do_sample": False, "temperature": 0.7}, 7)[1]["do_sample"]
    assert not translate({"do_sample": True, "temperature": 0}, 7)[1]["do_sample"]
    assert translate({"num_beams": 2, "image_aspect_ratio": "pad"}, 7)[1]["num_beams"] == 2
    with pytest.raises(UsageError, match="visual_cot"):
        translate({"visual_cot": True}, 7)


@pytest.mark.parametrize("words", ["batch_size=auto", "max_batch_size=4", "method=nonsense"])
def test_wrong_model_arguments(lmms_eval: str, words: str) -> None:
    from mmfix.errors import MethodError

    name, _, value = words.partition("=")
    with pytest.raises((UsageError, MethodError), match=name if name != "method" else "unknown method"):
        load(f"{OURS}lmms_eval.simple.MmfixSimple")(**{name: value})


def test_the_entry_points_load_nothing_heavy() -> None:
    """A harness loads every plug-in's entry point at its start, and one that fails stops the others."""
    code = (
        "import sys, types\n"
        "import mmfix_evals.plugins.lmms_eval.manifest as m\n"
        "module = types.ModuleType('inspect_ai.model')\n"
        "module.modelapi = lambda name: lambda f: f\n"
        "sys.modules['inspect_ai'] = types.ModuleType('inspect_ai'); sys.modules['inspect_ai.model'] = module\n"
        "import mmfix_evals.plugins.inspect_ai.registry\n"
        "print([n for n in ('torch', 'transformers', 'mmfix', 'lmms_eval', 'numpy') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="lmms-eval not installed")
def test_the_real_registry_takes_the_manifests() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    forget()
    registry = ModelRegistryV2()
    for one in registry._coerce_payload_to_manifests(manifests):
        registry.register_manifest(one)
    assert registry.get_model_class("mmfix").__name__ == "MmfixChat"
    assert registry.get_model_class("mmfix", force_simple=True).__name__ == "MmfixSimple"


@pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="lmms-eval not installed")
def test_the_real_lmms_eval_runs_a_task(tmp_path: Any) -> None:
    """Through its own command, which finds the model by the entry point."""
    if not any(one.name == "mmfix" for one in metadata.entry_points(group="lmms_eval.models")):
        pytest.skip("mmfix is not installed, only importable")
    row = {"image": str(PICTURE), "question": PROMPT, "answer": "image"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "helpers.py").write_text(HELPERS)
    (tmp_path / "mmfix_one.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    for kind in ("--force_simple", "--log_samples"):
        out = tmp_path / kind.strip("-")
        command = [sys.executable, "-m", "lmms_eval", "--model", "mmfix", "--tasks", "mmfix_one", "--include_path"]
        words = [str(tmp_path), "--model_args", "pretrained=tiny,method=vhr:alpha=2.0;drop_outliers=true"]
        subprocess.run([*command, *words, "--output_path", str(out), kind], check=True, capture_output=True)
        (found,) = out.rglob("*_results.json")
        assert json.loads(found.read_text())["results"]["mmfix_one"]["right,none"] == 1.0


TASK = """\
task: mmfix_one
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function helpers.visual
doc_to_text: !function helpers.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false}}
process_results: !function helpers.results
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
HELPERS = """\
from PIL import Image
def visual(doc): return [Image.open(doc["image"]).convert("RGB")]
def text(doc, more=None): return doc["question"]
def results(doc, found): return {"right": float(" shows " in str(found[0]))}
"""


@pytest.mark.skipif(not importlib.util.find_spec("inspect_ai"), reason="inspect_ai not installed")
def test_inspect_ai(answers: dict[str, str], tmp_path: Any) -> None:
    if not any(one.name == "mmfix" for one in metadata.entry_points(group="inspect_ai")):
        importlib.import_module(f"{OURS}inspect_ai.registry")  # not installed: what the entry point would load
    import asyncio

    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, GenerateConfig, get_model
    from inspect_ai.scorer import exact
    from inspect_ai.solver import generate

    def asked(text: str, image: str) -> list[Any]:
        return [ChatMessageUser(content=[ContentImage(image=image), ContentText(text=text)])]

    model = get_model("mmfix/tiny", method="vhr", config=GenerateConfig(max_tokens=24))
    samples = [Sample(input=asked(PROMPT, image), target=answers["vhr"]) for image in (str(PICTURE), data_url())]
    (log,) = eval(
        Task(dataset=samples, solver=generate(), scorer=exact()), model=model, log_dir=str(tmp_path), display="none"
    )
    assert log.status == "success", log.error
    assert log.results is not None
    assert log.results.scores[0].metrics["mean"].value == 1.0
    config = GenerateConfig(max_tokens=4, logprobs=True, stop_seqs=["never"])
    output = asyncio.run(model.generate(asked(PROMPT, data_url()), config=config))
    assert (output.stop_reason, output.usage.output_tokens) == ("max_tokens", 4)
    assert output.usage.input_tokens > 64
    assert len(output.choices[0].logprobs.content) == 4
    assert output.metadata["fired"]["vhr"]["considered"] > 0
    for wrong in (GenerateConfig(num_choices=2), GenerateConfig(presence_penalty=0.5)):
        with pytest.raises(UsageError):
            asyncio.run(model.generate(asked(PROMPT, data_url()), config=wrong))
