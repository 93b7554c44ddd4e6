"""Sink dimensions: found where they are planted, stored, looked up, and known for published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import vlm
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration

import mmfix
from mmfix import calibration, sinksearch
from mmfix.calibration import SinkCalibration, calibrated, sink_dimensions
from mmfix.errors import MethodError, MmfixError, MmfixWarning
from mmfix.methods import VAR, SoFA
from mmfix.sinksearch import find_sinks
from mmfix_kernels import Label

FOUND = SinkCalibration(
    sink_dims=(11, 29),
    tau=2.5,
    sink_phi=5.0,
    other_phi=1.2,
    sinks_per_prompt=1.0,
    image_sinks_per_prompt=0.0,
    prompts=4,
)


def plant(dims: dict[int, float]) -> LlavaForConditionalGeneration:
    """A tiny LLaVA whose BOS is massive in `dims` and, through them, collects the attention of every head.

    Every token carries a constant in dimension 5; queries read it, keys read the planted dimensions, and both write
    to the slowest rotary pair of each head. No layer writes to any of these dimensions.
    """
    model = vlm.tiny_llava(seed=7)
    width = vlm.HIDDEN // vlm.HEADS
    with torch.no_grad():
        language = model.model.language_model
        language.embed_tokens.weight[:, 5] = 3.0
        model.model.multi_modal_projector.linear_2.weight[5] = 0.0
        model.model.multi_modal_projector.linear_2.bias[5] = 3.0
        for layer in language.layers:
            for name in (5, *dims):
                layer.self_attn.o_proj.weight[name] = 0.0
                layer.mlp.down_proj.weight[name] = 0.0
            slow = torch.zeros(width)
            slow[width // 2 - 1] = slow[-1] = 1.0
            layer.self_attn.q_proj.weight[:, 5] = slow.repeat(vlm.HEADS)
            for name, value in dims.items():
                layer.self_attn.k_proj.weight[:, name] = slow.repeat(vlm.HEADS) * (1 if value > 0 else -1)
        for name, value in dims.items():
            language.embed_tokens.weight[1, name] = value
    return model


def prompts(pad: int = 0) -> list[dict[str, Any]]:
    rows = [vlm.tokens(3, "image", 6, seed=1), vlm.tokens(5, "image", 9, seed=2)]
    return [vlm.batch(rows, vlm.picture(n, 2), len(rows[1]) + pad) for n in range(2)]


@pytest.mark.parametrize("dims", [{11: 60.0, 29: 50.0}, {11: 60.0}, {40: -70.0}])
def test_a_planted_dimension_is_found(dims: dict[int, float]) -> None:
    model = plant(dims)
    found = find_sinks(model, prompts())
    assert found.sink_dims == tuple(sorted(dims))
    assert found.other_phi < found.tau < found.sink_phi
    assert found.sinks_per_prompt == pytest.approx(1.0)  # BOS, in every layer of every prompt
    assert found.image_sinks_per_prompt == 0.0
    assert found.prompts == 4
    inputs = prompts()[0]
    with mmfix.mitigate(model, VAR(sink_dims=found.sink_dims, tau=found.tau)) as fix:
        vlm.logits(model, inputs)
    for state in fix._session.layers[2:-1]:
        labels = state.labels[:, : inputs["input_ids"].shape[1]]
        assert torch.equal(labels == Label.TEXT_SINK, inputs["input_ids"] == 1)


def test_padding_does_not_change_what_is_found() -> None:
    model = plant({11: 60.0, 29: 50.0})
    bare, padded = find_sinks(model, prompts()), find_sinks(model, prompts(pad=9))
    assert padded.sink_dims == bare.sink_dims
    assert padded.sinks_per_prompt == bare.sinks_per_prompt
    assert padded.tau == pytest.approx(bare.tau, rel=0.05)


def test_of_long_prompts_a_sample_is_kept() -> None:
    """Counts are then estimates: tokens that were not drawn stand in those that were."""
    model = plant({11: 60.0})
    family, batch = mmfix.describe(model), prompts()[0]
    whole = sinksearch._looked(family, batch, 2, 1000, 0)
    part = sinksearch._looked(family, batch, 2, 7, 0)
    assert (len(part["others"]), float(whole["share"])) == (7 * 2, 1.0)
    assert float(part["share"]) == pytest.approx(14 / len(whole["others"]))
    assert all((whole["others"] == row).all(1).any() for row in part["others"])
    assert torch.equal(part["sinks"], whole["sinks"])
    for image in (False, True):
        drawn = part["other_image"].sum() if image else 14
        assert sinksearch._above(part, [3], 0.0, image) == pytest.approx(
            float(part["sink_image"].sum() if image else len(part["sinks"])) + float(drawn) * len(whole["others"]) / 14
        )
    assert int(whole["other_image"].sum()) == 2 * 9 * 2  # nine patches, two prompts, two layers
    assert find_sinks(model, prompts(), rows=7).sink_dims == (11,)


def test_finding_sinks_leaves_the_model_alone() -> None:
    model = plant({11: 60.0})
    before = vlm.logits(model, vlm.one())
    find_sinks(model, prompts())
    assert model.config.text_config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="input_ids"):
        find_sinks(model, [{"pixel_values": vlm.picture()}])  # the forward pass itself fails
    assert model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(vlm.logits(model, vlm.one()), before)


def test_no_prompts_and_no_sinks(llava: Any) -> None:
    with pytest.raises(MmfixError, match="no prompts"):
        find_sinks(llava, [])
    flat = vlm.tiny_llava(seed=3)
    with torch.no_grad():
        for layer in flat.model.language_model.layers:
            layer.self_attn.q_proj.weight.zero_()
    with pytest.raises(MmfixError, match="no attention"):
        find_sinks(flat, prompts())


def test_the_users_cache(llava: Any) -> None:
    path = calibration.save(llava, FOUND)
    assert path.is_relative_to(calibration.cache_folder())
    assert sink_dimensions(mmfix.describe(llava)) == FOUND.sink_dims
    assert calibrated(llava, "var") == VAR(sink_dims=(11, 29), tau=2.5)
    with mmfix.mitigate(llava, "var") as fix:
        assert fix.methods == (VAR(sink_dims=(11, 29), tau=2.5),)
    with mmfix.mitigate(llava, "var", tau=1.5, move=0.3) as fix:
        assert fix.methods == (VAR(sink_dims=(11, 29), tau=1.5, move=0.3),)
    with mmfix.mitigate(llava, VAR()) as fix:  # an object is used as it is; only what it leaves open is looked up
        assert fix.methods == (VAR(sink_dims=(11, 29)),)
    with mmfix.mitigate(llava, ["vhr", "var"]) as fix:
        assert fix.methods[1] == VAR(sink_dims=(11, 29), tau=2.5)
    assert not [p for p in path.parent.iterdir() if p.suffix == ".tmp"]


def test_values_that_are_the_defaults_were_calibrated_too(llava: Any) -> None:
    calibration.keep(llava, "sofa", {"sigma": 0.5, "layers": "even"}, {"data": "own pictures"})
    for method, values in (("sofa", {"sigma": 0.5, "layers": "even"}), (SoFA(sigma=0.3), None)):
        with mmfix.mitigate(llava, method) as fix:
            told = fix.report().calibrated.get("sofa")
        assert (told and told["values"]) == values


def test_values_of_another_revision_are_said_to_be(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.keep(llava, "sofa", {"sigma": 0.25}, {"revision": "aaaa"})
    monkeypatch.setattr(llava.config, "_commit_hash", "aaaa", raising=False)
    with mmfix.mitigate(llava, "sofa") as fix:
        assert "model_revision" not in fix.report().calibrated["sofa"]
    monkeypatch.setattr(llava.config, "_commit_hash", "bbbb", raising=False)
    with pytest.warns(MmfixWarning, match="calibrated for revision aaaa"), mmfix.mitigate(llava, "sofa") as fix:
        report = fix.report()
    assert report.calibrated["sofa"]["model_revision"] == "bbbb"
    assert "now bbbb; calibrate again" in report.notes[0]


def test_another_shape_has_another_file(llava: Any) -> None:
    calibration.save(llava, FOUND)
    other = vlm.LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=vlm.LlamaConfig(
                vocab_size=100, hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
            ),
            vision_config=llava.config.vision_config,
            image_token_index=vlm.IMAGE_ID,
        )
    )
    with pytest.raises(MethodError, match="not known"):
        sink_dimensions(mmfix.describe(other))


def test_a_file_in_the_models_folder_comes_first(llava: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tiny model"
    llava.save_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    calibration.save(model, SinkCalibration((3,), 9.0, 1.0, 1.0, 1.0, 1.0, 1))
    assert calibrated(model, "var") == VAR(sink_dims=(3,), tau=9.0)
    path = calibration.save(model, FOUND, folder)
    assert path == folder / "mmfix.json"
    assert json.loads(path.read_text())["sinks"]["prompts"] == 4
    assert calibrated(model, "var") == VAR(sink_dims=(11, 29), tau=2.5)
    assert sink_dimensions(mmfix.describe(model)) == (11, 29)
    assert calibrated(model, "vhr") == mmfix.method("vhr")


@pytest.mark.parametrize("content", ["{", "", "\x00"])
def test_a_corrupt_file(llava: Any, content: str) -> None:
    path = calibration.save(llava, FOUND)
    path.write_text(content)
    for method in ("var", VAR()):
        with pytest.raises(MmfixError, match="delete it") as caught, mmfix.mitigate(llava, method):
            pass
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [{"sinks": {"sink_dims": None}}, {"sinks": {"other": 1}}, {"sinks": 5}, {"methods": []}, {"methods": {"var": 3}}],
)
def test_a_file_of_the_wrong_shape(llava: Any, content: Any) -> None:
    path = calibration.save(llava, FOUND)
    path.write_text(json.dumps(content))
    with pytest.raises(MmfixError), mmfix.mitigate(llava, "var"):
        pass


def test_a_folder_that_cannot_be_written(llava: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MmfixError, match="choose a writable folder"):
        calibration.save(llava, FOUND, tmp_path / "file")


def on_meta(build: Any, config: Any) -> tuple[int, ...]:
    """Known dimensions of a model of that size, without its weights."""
    with torch.device("meta"):
        model = build(config)
    return sink_dimensions(mmfix.describe(model))


def llava_15(hidden: int, layers: int, vocabulary: int = 32064) -> LlavaConfig:
    """Shapes of llava-hf/llava-1.5-7b-hf and -13b-hf."""
    text = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary,
            "num_attention_heads": hidden // 128, "intermediate_size": 64}  # fmt: skip
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 64, "image_size": 336, "patch_size": 14}  # fmt: skip
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=32000)


@pytest.mark.parametrize(("hidden", "layers", "dims"), [(4096, 32, (1415, 2533)), (5120, 40, (2100, 4743))])
@pytest.mark.parametrize("vocabulary", [32000, 32064])
def test_llava_15_is_known(hidden: int, layers: int, dims: tuple[int, ...], vocabulary: int) -> None:
    assert on_meta(LlavaForConditionalGeneration, llava_15(hidden, layers, vocabulary)) == dims


def test_qwen2_vl_7b_is_known() -> None:
    text = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "intermediate_size": 64, "vocab_size": 152064}  # fmt: skip
    vision = {"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 3584}
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    assert on_meta(Qwen2VLForConditionalGeneration, config) == (458, 2570)


@pytest.mark.parametrize(
    ("hidden", "layers", "vocabulary"), [(4096, 32, 128320), (4096, 31, 32064), (2048, 32, 32064), (5120, 32, 32064)]
)
def test_other_models_of_nearly_that_shape_are_not(hidden: int, layers: int, vocabulary: int) -> None:
    """VAR-5: a Llama-3 LLaVA has the 7B shape and other sinks."""
    config = llava_15(hidden, layers, vocabulary)
    config.text_config.num_attention_heads = 8
    with pytest.raises(MethodError, match="mmfix calibrate sinks --model"):
        on_meta(LlavaForConditionalGeneration, config)


def test_every_known_entry_names_real_model_types() -> None:
    """A typo in the table would never match anything."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    remote = {"internvl_chat", "internlm2"}  # code on the hub
    for kinds, text, *_ in calibration.KNOWN_SINKS:
        for name in (*kinds, text):
            assert name in CONFIG_MAPPING_NAMES or name in remote, name
    assert CONFIG_MAPPING["qwen2_vl"]().text_config.model_type == "qwen2_vl_text"
    assert CONFIG_MAPPING["llava"]().text_config.model_type == "llama"
