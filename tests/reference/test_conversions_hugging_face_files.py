"""Files of transformers: names, tasks, configurations, folders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.layers import get_act_layer
from torch import nn

from cdam_server.compute.conversions.converted import TextSide
from cdam_server.compute.conversions.folder import read
from cdam_server.compute.conversions.hugging_face import MODEL_TYPES, convert
from cdam_server.compute.conversions.hugging_face.common import ACTIVATIONS
from cdam_server.compute.conversions.tensors import ConversionError
from reference import foreign
from reference.hugging_face_models import BY_ID, CASES, MLP, ours, theirs

# --- names and tasks


def test_names_come_from_id2label(tmp_path: Path) -> None:
    theirs(BY_ID["vit"]).save_pretrained(tmp_path)
    converted, built = ours(tmp_path)
    assert converted.output_names == ("cat", "dog", "cat", "owl", "fox")
    assert built.num_classes == 5
    files = read(tmp_path)
    for labels, reason in (
        ({"0": "cat", "1": "dog"}, "id2label names 2 outputs, but the classifier has 5"),
        ({"1": "a", "2": "b", "3": "c", "4": "d", "5": "e"}, "id2label names 5 outputs, but the classifier has 5"),
        ({"cat": "0"}, "id2label is no mapping from numbers to names"),
        (["cat"], "id2label is no mapping"),
    ):
        with pytest.raises(ConversionError, match=reason):
            convert({**files.config, "id2label": labels}, files.tensors)


@pytest.mark.parametrize(
    ("problem", "task"),
    [
        ("multi_label_classification", "multi_label"),
        ("single_label_classification", "multi_class"),
        ("regression", "regression"),
        (None, None),
    ],
)
def test_the_problem_type_is_the_task(problem: str | None, task: str | None, tmp_path: Path) -> None:
    theirs(BY_ID["vit"]).save_pretrained(tmp_path)
    files = read(tmp_path)
    assert convert({**files.config, "problem_type": problem}, files.tensors).task == task
    with pytest.raises(ConversionError, match="problem_type is 'guessing'"):
        convert({**files.config, "problem_type": "guessing"}, files.tensors)


def test_a_classifier_that_is_promised_must_be_there(tmp_path: Path) -> None:
    theirs(BY_ID["vit"]).save_pretrained(tmp_path)
    files = read(tmp_path)
    without = {name: tensor for name, tensor in files.tensors.items() if not name.startswith("classifier")}
    with pytest.raises(ConversionError, match=r"ViTForImageClassification has a classifier, but classifier\.weight"):
        convert(files.config, without)
    assert convert({**files.config, "id2label": {}}, without).model_kwargs["num_classes"] == 0
    # One that is there is used, whatever class is named.
    named_bare = {**files.config, "architectures": ["ViTModel"]}
    assert convert(named_bare, files.tensors).model_kwargs["num_classes"] == 5
    unnamed = {key: value for key, value in files.config.items() if key != "architectures"}
    assert convert(unnamed, files.tensors).model_kwargs["num_classes"] == 5


def test_poolers_are_left_out_and_said(tmp_path: Path) -> None:
    theirs(BY_ID["vit_bare"]).save_pretrained(tmp_path)
    (note,) = ours(tmp_path)[0].notes
    assert note.startswith("left out: the pooler; the latent is last_hidden_state[:, 0] (pooler.dense.bias, ")


def test_what_texts_are_compared_with_is_kept(tmp_path: Path) -> None:
    model = theirs(BY_ID["siglip"])
    model.save_pretrained(tmp_path)
    text = ours(tmp_path)[0].text
    assert text == TextSide(pytest.approx(model.logit_scale.item()), pytest.approx(model.logit_bias.item()))


# --- configurations

CONFIGS = {
    "vit": transformers.ViTConfig,
    "deit": transformers.DeiTConfig,
    "beit": transformers.BeitConfig,
    "dinov2": transformers.Dinov2Config,
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
    "dinov3_vit": transformers.DINOv3ViTConfig,
    "clip": transformers.CLIPVisionConfig,
    "clip_vision_model": transformers.CLIPVisionConfig,
    "siglip": transformers.SiglipVisionConfig,
    "siglip_vision_model": transformers.SiglipVisionConfig,
}


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_defaults_are_transformers_own(name: str) -> None:
    config = CONFIGS[name]()
    for key, value in MODEL_TYPES[name].defaults.items():
        assert getattr(config, key) == value, key


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_transformers(name: str) -> None:
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    ours = get_act_layer(ACTIVATIONS[name])()
    torch.testing.assert_close(ours(x), transformers.activations.ACT2FN[name](x), rtol=0, atol=1e-12)


def test_sizes_that_the_file_leaves_out_are_the_class_s(tmp_path: Path) -> None:
    """SigLIP's files keep only what differs from the defaults."""
    theirs(BY_ID["siglip_tower"]).save_pretrained(tmp_path)
    files = read(tmp_path)
    kept = {key: value for key, value in files.config.items() if key not in {"hidden_act", "layer_norm_eps"}}
    converted = convert(kept, files.tensors)
    assert (converted.model_kwargs["act_layer"], converted.norm_eps) == ("gelu_tanh", 1e-6)


def test_old_clip_files_keep_the_image_tower_elsewhere(tmp_path: Path) -> None:
    theirs(BY_ID["clip"]).save_pretrained(tmp_path)
    files = read(tmp_path)
    tower = {key: files.config["vision_config"][key] for key in MLP}
    old = {**files.config, "vision_config": {"hidden_size": 999}, "vision_config_dict": tower}
    expected, found = convert(files.config, files.tensors), convert(old, files.tensors)
    assert found.settings == expected.settings


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("vit", {"model_type": "siglip2"}, "SigLIP 2 NaFlex has no fixed patch grid"),
    ("vit", {"model_type": "vit_mae"}, "model_type is vit_mae: ViTMAE hides random patches"),
    ("vit", {"model_type": "swin"}, "Swin merges patches on the way"),
    ("vit", {"model_type": "llama"}, "model_type is llama; those that convert are vit, deit, beit"),
    ("vit", {"architectures": ["ViTForMaskedImageModeling"]}, "architectures names ViTForMaskedImageModeling; of vit"),
    ("beit", {"architectures": ["BeitForSemanticSegmentation"]}, "architectures names BeitForSemanticSegmentation"),
    ("dinov2", {"architectures": ["Dinov2Backbone"]}, "architectures names Dinov2Backbone; of dinov2 there are"),
    ("vit", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'; timm has equals of gelu, gelu_new"),
    ("beit", {"hidden_act": "relu"}, "hidden_act is 'relu', but timm's BEiT has gelu only"),
    ("dinov3", {"hidden_act": "relu"}, "hidden_act is 'relu', but timm's DINOv3 has gelu only"),
    ("vit", {"quantization_config": {"bits": 4}}, "config.json has quantization_config, which can't be converted"),
    ("vit", {"auto_map": {"AutoModel": "modeling.Mine"}}, "config.json has auto_map"),
    ("vit", {"num_channels": 1}, "num_channels is 1; only RGB is served"),
    ("vit", {"head_dim": 8}, "head_dim is 8, but timm's heads have 16"),
    ("vit", {"num_attention_heads": 5}, "hidden_size 48 is no multiple of num_attention_heads 5"),
    ("vit", {"num_hidden_layers": 3}, "num_hidden_layers is 3, but the checkpoint has 2"),
    ("vit", {"hidden_size": "48"}, "hidden_size is '48' in place of a positive number"),
    ("vit", {"patch_size": 16}, r"there are 17 positions for 2 x 2 patches"),
    ("vit", {"image_size": 0}, "image_size is 0 in place of one or two positive numbers"),
    ("vit", {"intermediate_size": 99}, r"blocks.0.mlp.fc1.weight is \(100, 48\) in place of \(99, 48\)"),
    ("beit", {"image_size": [32, 48]}, r"image_size is \[32, 48\]: transformers' BEiT takes squares only"),
    ("dinov2", {"image_size": [32, 48]}, r"image_size is \[32, 48\]: transformers' DINOv2 takes squares only"),
    ("dinov2_registers", {"num_register_tokens": 3}, "the checkpoint has 4 registers; num_register_tokens says"),
    ("siglip_tower", {"vision_use_head": False}, "vision_use_head is false: without its pooling"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSALS, ids=[str(refusal[1]) for refusal in REFUSALS])
def test_configurations_that_are_refused(name: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    theirs(BY_ID[name]).save_pretrained(tmp_path)
    files = read(tmp_path)
    with pytest.raises(ConversionError, match=reason) as caught:
        convert({**files.config, **changes}, files.tensors).build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [case.id for case in CASES])
def test_a_tensor_that_nobody_knows_is_an_error(name: str, tmp_path: Path) -> None:
    theirs(BY_ID[name]).save_pretrained(tmp_path)
    files = read(tmp_path)
    extra = {**files.tensors, "adapter.lora_A.weight": torch.zeros(2, 2)}
    size = {} if BY_ID[name].size in {(32, 32), (32, 48)} else {"input_size": BY_ID[name].size}
    with pytest.raises(ConversionError, match=r"holds more than the model: adapter\.lora_A\.weight"):
        convert(files.config, extra, **size)


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    theirs(BY_ID["dinov2"]).save_pretrained(tmp_path)
    files = read(tmp_path)
    without = {name: tensor for name, tensor in files.tensors.items() if "layer.1.norm2" not in name}
    with pytest.raises(ConversionError, match=r"encoder\.layer\.1\.norm2\.weight is missing"):
        convert(files.config, without)


def test_one_tensor_under_two_names_is_an_error(tmp_path: Path) -> None:
    model = theirs(BY_ID["vit"])
    model.save_pretrained(tmp_path)
    files = read(tmp_path)
    name = "vit.layers.0.attention.q_proj.weight"
    twice = {**files.tensors, name: model.state_dict()[name]}
    with pytest.raises(ConversionError, match=r"two tensors are layers\.0\.attention\.q_proj\.weight: vit\.encoder"):
        convert(files.config, twice)


def test_keys_with_a_bias_under_rotary_positions(tmp_path: Path) -> None:
    config = transformers.DINOv3ViTConfig(**MLP, key_bias=True)
    model = foreign.randomise(transformers.DINOv3ViTModel(config))
    with pytest.raises(ConversionError, match=r"k_proj\.bias is not zero, and timm's DINOv3 has no bias for keys"):
        convert(config.to_dict(), model.state_dict())


def test_the_processor_must_fit_the_model(tmp_path: Path) -> None:
    theirs(BY_ID["vit"]).save_pretrained(tmp_path)
    files = read(tmp_path)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}
    with pytest.raises(ConversionError, match=r"images of 64 x 64, but image_size is 32 x 32; .* say input_size"):
        convert(files.config, files.tensors, processor)
    converted = convert(files.config, files.tensors, processor, input_size=(64, 64))
    assert converted.data_config.input_size == (64, 64)
    assert converted.build().patch_embed.img_size == (64, 64)
    with pytest.raises(ConversionError, match="input_size: 30 x 32 pixels is no multiple of the patch size 8 x 8"):
        convert(files.config, files.tensors, input_size=(30, 32))


def test_relative_positions_are_for_one_size(tmp_path: Path) -> None:
    theirs(BY_ID["beit"]).save_pretrained(tmp_path)
    files = read(tmp_path)
    with pytest.raises(ConversionError, match="input_size: BEiT's relative positions are for 32 pixels only"):
        convert(files.config, files.tensors, input_size=(64, 64))


def test_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    model = theirs(BY_ID["vit"]).half()
    model.save_pretrained(tmp_path)
    _, built = ours(tmp_path)
    weight = model.vit.layers[1].mlp.fc1.weight
    assert torch.equal(built.blocks[1].mlp.fc1.weight, weight.float())


# --- folders


def test_preprocessing_is_found_in_either_file(tmp_path: Path) -> None:
    """transformers 5 saves the processor of a model with texts as a whole."""
    theirs(BY_ID["vit"]).save_pretrained(tmp_path)
    assert read(tmp_path).processor is None
    content = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    assert read(tmp_path).processor == content
    config = ours(tmp_path)[0].data_config
    assert (config.input_size, config.mean, config.interpolation) == ((32, 32), (0.5, 0.5, 0.5), "bilinear")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**content, "resample": 3}))
    assert ours(tmp_path)[0].data_config.interpolation == "bicubic"


def _check_weights(folder: Path, model: nn.Module) -> None:
    """What was read is what the module holds."""
    files = read(folder)
    expected, found = (convert(files.config, tensors).weights for tensors in (model.state_dict(), files.tensors))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards_are_put_together(safe: bool, tmp_path: Path) -> None:
    model = theirs(BY_ID["vit"])
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    if not safe:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        for file in set(index["weight_map"].values()):
            torch.save(load_file(tmp_path / file), tmp_path / file.replace(".safetensors", ".bin"))
            (tmp_path / file).unlink()
        renamed = {name: file.replace(".safetensors", ".bin") for name, file in index["weight_map"].items()}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": renamed}))
        (tmp_path / "model.safetensors.index.json").unlink()
    assert len(list(tmp_path.glob("model-*"))) > 2
    _check_weights(tmp_path, model)


def test_a_pickle_without_code(tmp_path: Path) -> None:
    model = theirs(BY_ID["clip"])
    model.save_pretrained(tmp_path)
    torch.save(read(tmp_path).tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    _check_weights(tmp_path, model)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    def refused(reason: str) -> None:
        with pytest.raises(ConversionError, match=reason) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)

    refused(r"there is no config\.json in ")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(r"there is no config\.json in .*, but adapter_config\.json")
    (tmp_path / "config.json").write_text("[1]")
    refused("holds no JSON object")
    (tmp_path / "config.json").write_text('{"model_type": ')
    refused("can't be read")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    refused(r"there are no weights in .*: none of model\.safetensors, .*, but adapter_config\.json, config\.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    refused("needs code to be read, or is damaged")
    torch.save({}, tmp_path / "pytorch_model.bin")
    refused("there are no weights in ")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../model.safetensors"}}')
    refused("has no weight_map from tensors to files in this folder")
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    refused(r"there is no file .*model-1\.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    refused(r"holds b, which model\.safetensors\.index\.json says to be in None")
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}')
    refused("lists a, which the files do not hold")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    refused(r"model\.safetensors is damaged, or no safetensors file")
