"""Commands that load a model: a random LLaVA in a folder, through the same path as any checkpoint."""

from __future__ import annotations

import importlib.util
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import fake_eval
import pytest
import torch
from PIL import Image

from mmfix_evals import headdata
from mmfix_evals.cli.quiet import hush
from mmfix_evals.rescore import rescore

Call = Callable[..., tuple[int, str, str]]


def maker() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "decoding" / "small_llava.py"
    spec = importlib.util.spec_from_file_location("small_llava_of_decoding", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    module = maker()
    module.make_model().to(torch.bfloat16).save_pretrained(folder)
    module.make_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (30, 20), (200, 30, 60)).save(path)
    return path


def test_describe_prints_two_labelled_blocks_and_how_often_it_fired(call: Call, model: Path, picture: Path) -> None:
    words = ["describe", picture, "--model", model, "--method", "vhr:alpha=4", "--max-new-tokens", 6]
    code, printed, _ = call(*words)
    assert code == 0
    assert printed.startswith("[plain]\n")
    assert "\n[vhr:alpha=4]\n" in printed
    assert "vhr changed " in printed.splitlines()[-1]
    code, printed, _ = call(*words, "--json")
    content = json.loads(printed)
    assert content["answers"].keys() == {"plain", "vhr:alpha=4"}
    assert content["method"][0]["params"]["alpha"] == 4
    assert content["answers"]["vhr:alpha=4"]["report"]["fired"]["vhr"]["considered"] > 0
    assert content["answers"]["plain"]["report"] is None


def header(width: int, height: int) -> bytes:
    """A PNG that claims a size and breaks off."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + struct.pack(">I", 400) + b"IDAT" + b"abcd"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist"),
        (b"", "empty"),
        (b"these are words\n", "text, not an image"),
        (header(100_000, 100_000), "100000 × 100000"),
        (header(20, 20), "picture.png"),
    ],
    ids=["missing", "empty", "text", "huge", "cut"],
)
def test_bad_pictures_are_one_line(call: Call, model: Path, tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    code, printed, errors = call("describe", path, "--model", model, "--method", "vhr")
    assert (code, printed) == (1, "")
    assert told in errors
    assert len(errors.strip().splitlines()) == 1


def test_bad_models_and_methods(call: Call, picture: Path, model: Path, tmp_path: Path) -> None:
    code, printed, errors = call("describe", picture, "--model", tmp_path / "nothing", "--method", "vhr")
    assert (code, printed, len(errors.strip().splitlines())) == (1, "", 1)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "frobnicator"}')
    code, printed, errors = call("describe", picture, "--model", tmp_path / "strange", "--method", "vhr")
    assert (code, printed, len(errors.strip().splitlines())) == (1, "", 1)
    assert "frobnicator" in errors
    code, _, errors = call("describe", picture, "--model", model, "--method", "vrh")
    assert code == 2
    assert "vhr" in errors
    code, _, errors = call("describe", picture, "--model", model, "--method", "var")
    assert code == 2
    assert "mmfix calibrate sinks" in errors


def test_calibrate_finds_sinks_and_writes_them_where_var_looks(call: Call, tmp_path: Path) -> None:
    module = maker()
    strong = module.make_model()
    with torch.no_grad():  # one token with a massive dimension, and keys that every query likes
        embeddings = strong.model.language_model.embed_tokens.weight
        embeddings[:, 7] = 1.0
        embeddings[1, :] = 0.0
        embeddings[1, 7] = 40.0
        for layer in strong.model.language_model.layers:
            for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                weight[:, 7] = 2.0
    folder = tmp_path / "strong"
    hush()
    strong.save_pretrained(folder)
    module.make_processor().save_pretrained(folder)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(3):
        fake_eval.picture(f"{index}").resize((30, 30)).save(pictures / f"{index}.png")
    code, printed, errors = call("calibrate", "sinks", "--model", folder, "--images", pictures, "--json")
    assert (code, errors) == (0, "")
    found = json.loads(printed)
    assert found["prompts"] == 3
    assert found["sink_dims"]
    kept = json.loads(Path(found["file"]).read_text())
    assert kept["methods"]["var"]["tau"] == found["tau"]
    record = kept["calibrations"]["var"]
    assert record["data_sha256"] == headdata.digest(headdata.described(pictures, 16)) == found["data_sha256"]
    assert (record["data"], record["values"]["sink_dims"]) == ("own pictures", found["sink_dims"])
    assert (record["scores"]["prompts"], record["revision"]) == (3, found["revision"])
    assert call("describe", pictures / "0.png", "--model", folder, "--method", "var", "--max-new-tokens", "3")[0] == 0


def test_calibrate_vti_writes_directions_where_vti_looks(call: Call, model: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(2):
        fake_eval.picture(f"{index}").resize((30, 30)).save(pictures / f"{index}.png")
    lines = [{"image": f"{n}.png", "truthful": "a red square", "invented": "a blue cat"} for n in range(2)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, lines)))
    words = ["describe", pictures / "0.png", "--model", model, "--max-new-tokens", "3", "--method"]
    code, _, errors = call(*words, "vti")
    assert (code, "mmfix calibrate vti" in errors) == (2, True)
    base = ["calibrate", "vti", "--model", model, "--images", pictures, "--trials", "2", "--quiet"]
    code, printed, errors = call(*base)
    assert (code, errors, "alpha_text=0" in printed) == (0, "", True)
    assert call(*words, "vti:alpha_text=0")[0] == 0
    assert call(*words, "vti")[0] == 2
    code, printed, errors = call(*base, "--pairs", pairs, "--json")
    assert (code, errors) == (0, "")
    found = json.loads(printed)
    assert (found["pairs"], found["pictures"], len(found["text"]), len(found["vision"])) == (2, 2, 2, 3)
    told = [
        headdata.Asked(one.picture, one.prompt, "a red square\0a blue cat") for one in headdata.described(pictures, 2)
    ]
    assert (found["data"], found["data_sha256"]) == ("own pictures", headdata.digest(told))
    assert call(*words, "vti")[0] == 0
    pairs.write_text('{"image": "9.png", "truthful": "a", "invented": "b"}')
    code, _, errors = call(*base, "--pairs", pairs)
    assert (code, "line 1" in errors, "is no file" in errors) == (1, True, True)
    pairs.write_text('{"image": "0.png", "truthful": ""}')
    assert "each a text" in call(*base, "--pairs", pairs)[2]
    assert call("calibrate", "vti", "--pairs", pairs)[0] == 2
    assert call("calibrate", "vti", "--mask", "1.5")[0] == 2


def test_invented_captions_differ_in_one_object(model: Path) -> None:
    from mmfix_evals import tinyworld
    from mmfix_evals.cli.calibrate_vti import _tinyworld

    for index, (_, truthful, invented) in enumerate(_tinyworld(12)):
        present = set(tinyworld.scene("dev", index).categories)
        named = [{c for c in tinyworld.CATEGORIES if f" {c}" in text} for text in (truthful, invented)]
        assert named[0] == present
        assert len(named[1] - present) == 1


def test_run_and_resume_with_a_model(call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_eval.register(monkeypatch, fake_eval.FakePope(), fake_eval.FakeChair())
    out = tmp_path / "run"
    methods = "greedy,var:sink_dims=[3,5],tau=1.5,var:sink_dims=[3,5],tau=1.5+vhr"
    words = ["eval", "run", "--model", model, "--tasks", "fake-pope,fake-chair", "--methods", methods]
    words += ["--limit", "2", "--resamples", "20", "--max-new-tokens", "4", "--quiet", "--out", out]
    code, _, errors = call(*words)
    assert (code, errors) == (0, "")
    results = json.loads((out / "results.json").read_text())
    assert [arm["name"] for arm in results["methods"]][1:] == [
        "var:sink_dims=[3,5],tau=1.5",
        "var:sink_dims=[3,5],tau=1.5+vhr",
    ]
    assert len(results["model"]["sha256"]) == 64
    both = results["methods"][2]["name"]
    reports = json.loads((out / "reports.json").read_text())
    assert reports["fake-pope"][both]["layers"]
    considered = {e["method"]: e["fired"] for e in results["speed"] if e["task"] == "fake-chair"}
    assert considered[both].keys() == {"var", "vhr"}
    assert considered[both]["var"]["considered"] > 0
    assert rescore(out)["metrics"] == results["metrics"]
    before = (out / "samples.jsonl").read_bytes()
    (out / "samples.jsonl").write_bytes(b"".join(before.splitlines(keepends=True)[:7]))
    assert call(*words)[0] == 0
    again = json.loads((out / "results.json").read_text())
    assert (again["metrics"], again["comparisons"]) == (results["metrics"], results["comparisons"])


def test_sampling_gives_the_same_answers_in_any_batch(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_eval.register(monkeypatch, fake_eval.FakeChair())
    words = ["eval", "run", "--model", model, "--tasks", "fake-chair", "--methods", "greedy,vhr", "--limit", "3"]
    words += ["--resamples", "20", "--max-new-tokens", "4", "--quiet", "--gen-kwargs", "do_sample=true,temperature=1.5"]
    answers = []
    for size in ("1", "3"):
        assert call(*words, "--batch-size", size, "--out", tmp_path / size)[0] == 0
        lines = [json.loads(line) for line in (tmp_path / size / "samples.jsonl").read_text().splitlines()]
        answers.append({(line["method"], line["doc_id"]): line["response"] for line in lines})
    assert answers[0] == answers[1]
    code, _, errors = call(*words[:-1], "tempreature=1.5", "--out", tmp_path / "typo")
    assert (code, "tempreature" in errors) == (2, True)


def test_calibrating_on_nothing(call: Call, tmp_path: Path) -> None:
    code, _, errors = call("calibrate", "sinks", "--images", tmp_path / "none")
    assert (code, "no such folder" in errors) == (1, True)
    code, _, errors = call("calibrate", "sinks", "--images", tmp_path)
    assert (code, "holds no picture" in errors) == (1, True)


def test_methods_lists_paper_kind_cost_and_parameters(call: Call) -> None:
    code, printed, _ = call("methods")
    assert code == 0
    assert "var:move=0.6" in printed
    listed = {entry["name"]: entry for entry in json.loads(call("methods", "--json")[1])}
    assert listed["var"]["paper"].startswith("arXiv:")
    assert listed["var"]["paper"] in printed
    assert listed["vhr"]["params"]["alpha"]["default"] == 2.0


def test_doctor_reports_what_there_is_and_what_is_missing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfix_decoding.bundled", lambda: ["tiny"])
    code, printed, _ = call("doctor")
    assert code == 0
    assert "reference" in printed
    assert "everything needed is there" in printed
    found = json.loads(call("doctor", "--json")[1])
    assert found["versions"]["torch"]
    assert found["devices"][0]["name"] == "cpu"
    assert found["backends"]["reference"] == ""
    assert "pip install 'mmfix[app]'" in found["optional"]["gradio"]["install"]

    def broken() -> None:
        raise RuntimeError("driver too old")

    monkeypatch.setattr("mmfix_kernels.attention.backends", broken)
    code, printed, _ = call("doctor", "--json")
    found = json.loads(printed)
    assert code == 1
    assert any("driver too old" in problem for problem in found["problems"])
