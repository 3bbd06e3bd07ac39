"""Checkpoints of transformers, converted, against transformers' own modules: outputs, embeddings and maps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.layers import get_act_layer
from torch import Tensor, nn

from cdam_engine import Concept, Explainer, Output
from cdam_server.conversions.converted import Converted, TextSide
from cdam_server.conversions.folder import read
from cdam_server.conversions.hugging_face import MODEL_TYPES, convert
from cdam_server.conversions.hugging_face.common import ACTIVATIONS
from cdam_server.conversions.tensors import ConversionError
from reference import foreign

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
MLP = {**SIZES, "intermediate_size": 100}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "cat", 3: "owl", 4: "fox"}, "label2id": {}}


@dataclass(frozen=True, eq=False)
class Case:
    """One class of transformers' with one configuration.

    Attributes:
        id: What the tests call it.
        model_class: The class.
        config_class: Of its configuration.
        config: The arguments of the latter.
        norm1: Path of the last block's first LayerNorm.
        prefix: How many prefix tokens there are.
        answer: From the module's output to logits or embedding.
        size: The input, if not the configuration's.
        tolerance: In double precision.
    """

    id: str
    model_class: str
    config_class: str
    config: dict[str, Any]
    norm1: str
    prefix: int = 1
    answer: Callable[[Any], Tensor] = lambda out: out.logits
    size: tuple[int, int] = (32, 32)
    tolerance: float = 1e-10
    kwargs: dict[str, Any] = field(default_factory=dict)


def _cls(out: Any) -> Tensor:
    return out.last_hidden_state[:, 0]


def _pooled(out: Any) -> Tensor:
    return out.pooler_output


VIT_NORM, DINO_NORM, CLIP_NORM = "layers.{}.layernorm_before", "encoder.layer.{}.norm1", "encoder.layers.{}.layer_norm1"
ROPE = 1e-5  # of rotary positions, which both libraries compute in float32
BEIT_RELATIVE = {"use_relative_position_bias": True}
GATED = {"use_swiglu_ffn": True}

CASES = (
    Case("vit", "ViTForImageClassification", "ViTConfig", {**MLP, **LABELS}, "vit." + VIT_NORM),
    Case("vit_bare", "ViTModel", "ViTConfig", MLP, VIT_NORM, answer=_cls),
    Case(
        "vit_deep_oblong",
        "ViTForImageClassification",
        "ViTConfig",
        {**MLP, "num_hidden_layers": 4, "hidden_size": 40, "num_attention_heads": 5, "image_size": [32, 48], **LABELS},
        "vit." + VIT_NORM,
        size=(32, 48),
    ),
    Case(
        "vit_no_bias_one_layer",
        "ViTForImageClassification",
        "ViTConfig",
        {**MLP, "num_hidden_layers": 1, "qkv_bias": False, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-2},
        "vit." + VIT_NORM,
    ),
    Case("deit", "DeiTForImageClassification", "DeiTConfig", {**MLP, **LABELS}, "deit." + VIT_NORM, prefix=2),
    Case(
        "deit_distilled",
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        {**MLP, **LABELS},
        "deit." + VIT_NORM,
        prefix=2,
    ),
    Case("deit_bare", "DeiTModel", "DeiTConfig", MLP, VIT_NORM, prefix=2, answer=_cls),
    Case("beit", "BeitForImageClassification", "BeitConfig", {**MLP, **BEIT_RELATIVE, **LABELS}, "beit." + VIT_NORM),
    Case(
        "beit_shared_positions",
        "BeitForImageClassification",
        "BeitConfig",
        {**MLP, "use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0, "use_mask_token": True},
        "beit." + VIT_NORM,
    ),
    Case(
        "beit_class_token",
        "BeitForImageClassification",
        "BeitConfig",
        {**MLP, "use_absolute_position_embeddings": True, "use_mean_pooling": False, **LABELS},
        "beit." + VIT_NORM,
    ),
    Case("beit_bare", "BeitModel", "BeitConfig", {**MLP, **BEIT_RELATIVE}, VIT_NORM, answer=_pooled),
    Case("dinov2", "Dinov2ForImageClassification", "Dinov2Config", {**SIZES, **LABELS}, "dinov2." + DINO_NORM),
    Case("dinov2_bare", "Dinov2Model", "Dinov2Config", SIZES, DINO_NORM, answer=_pooled),
    Case(
        "dinov2_resampled",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**SIZES, "image_size": 56, **LABELS},
        "dinov2." + DINO_NORM,
        size=(40, 24),
        tolerance=1e-6,  # both resample in float32
    ),
    Case("dinov2_gated", "Dinov2Model", "Dinov2Config", {**SIZES, **GATED}, DINO_NORM, answer=_pooled),
    Case(
        "dinov2_registers",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {**SIZES, **GATED, **LABELS},
        "dinov2_with_registers." + DINO_NORM,
        prefix=5,
    ),
    Case(
        "dinov2_registers_resampled",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**SIZES, "image_size": 56, "num_register_tokens": 2},
        DINO_NORM,
        prefix=3,
        answer=_pooled,
        size=(24, 40),
        tolerance=1e-6,
    ),
    Case(
        "dinov3",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**MLP, "num_register_tokens": 4},
        "model.layer.{}.norm1",
        prefix=5,
        answer=_pooled,
        tolerance=ROPE,
    ),
    Case(
        "dinov3_gated_oblong",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {
            **MLP,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "mlp_bias": False,
            "query_bias": False,
            "rope_theta": 50.0,
        },
        "model.layer.{}.norm1",
        answer=_pooled,
        size=(24, 40),
        tolerance=ROPE,
    ),
    Case("clip_tower", "CLIPVisionModel", "CLIPVisionConfig", MLP, CLIP_NORM, answer=_pooled),
    Case(
        "clip_projected",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**MLP, "projection_dim": 20, "hidden_act": "gelu"},
        "vision_model." + CLIP_NORM,
        answer=lambda out: out.image_embeds,
    ),
    Case(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        {"vision_config": MLP, "text_config": TEXT, "projection_dim": 24},
        "vision_model." + CLIP_NORM,
        answer=lambda out: out,
    ),
    Case(
        "clip_classifier",
        "CLIPForImageClassification",
        "CLIPConfig",
        {"vision_config": MLP, "text_config": TEXT, **LABELS},
        "vision_model." + CLIP_NORM,
    ),
    Case("siglip_tower", "SiglipVisionModel", "SiglipVisionConfig", MLP, CLIP_NORM, prefix=0, answer=_pooled),
    Case(
        "siglip",
        "SiglipModel",
        "SiglipConfig",
        {"vision_config": {**MLP, "num_hidden_layers": 3}, "text_config": {**TEXT, "projection_size": 48}},
        "vision_model." + CLIP_NORM,
        prefix=0,
        answer=lambda out: out,
    ),
    Case(
        "siglip_classifier",
        "SiglipForImageClassification",
        "SiglipConfig",
        {"vision_config": MLP, "text_config": {**TEXT, "projection_size": 48}, **LABELS},
        "vision_model." + CLIP_NORM,
        prefix=0,
    ),
)
BY_ID = {case.id: case for case in CASES}
every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def theirs(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Their module, with random weights."""
    config = getattr(transformers, case.config_class)(**case.config)
    return foreign.randomise(getattr(transformers, case.model_class)(config).to(dtype))


def ours(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Converted, nn.Module]:
    """What was saved, converted and built."""
    files = read(folder)
    converted = convert(files.config, files.tensors, files.processor, **more)
    model = converted.build().to(dtype)
    model.load_state_dict(converted.weights)  # in the dtype in which it was saved
    return converted, model.eval()


def _forward(case: Case, model: nn.Module) -> Callable[[Tensor], Tensor]:
    if case.model_class in {"CLIPModel", "SiglipModel"}:
        return lambda pixels: model.get_image_features(pixels).pooler_output
    return lambda pixels: case.answer(model(pixels))


def _check(case: Case, model: nn.Module, converted: nn.Module, dtype: torch.dtype) -> None:
    """Outputs, embeddings and maps of one equal the other's."""
    tolerance = 1e-5 if dtype is torch.float32 else case.tolerance
    pixels = torch.randn(2, 3, *case.size, generator=torch.Generator().manual_seed(1)).to(dtype)
    forward = _forward(case, model)
    with torch.no_grad():
        expected, found = forward(pixels), converted(pixels)
    scale = expected.abs().max()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * scale
    has_logits = bool(converted.num_classes)
    wanted = torch.randn(expected.shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    if has_logits:
        wanted = torch.eye(expected.shape[1], dtype=dtype)[-1]
    depth = len(converted.blocks)
    norm1 = model.get_submodule(case.norm1.format(depth - 1))
    scores = foreign.cdam(model, norm1, forward, pixels, wanted).scores[:, case.prefix :]
    target = Output(expected.shape[1] - 1) if has_logits else Concept(wanted)
    explanations = Explainer(converted).explain(pixels, [[target]] * 2)
    maps = torch.stack([torch.as_tensor(item.maps[0].scores).flatten() for item in explanations])
    assert maps.abs().max() > 1e-3
    assert (maps - scores).abs().max() <= 2 * tolerance * scores.abs().max()
    if not has_logits:
        assert (torch.tensor(explanations[0].latent) - expected[0]).abs().max() <= tolerance * scale


@every_case
@both_precisions
def test_outputs_and_maps_equal_transformers(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model = theirs(case, dtype)
    model.save_pretrained(tmp_path)
    asked = {} if case.size == (32, 32) or case.id == "vit_deep_oblong" else {"input_size": case.size}
    converted, built = ours(tmp_path, dtype, **asked)
    assert converted.source == f"transformers:{case.model_class}"
    _check(case, model, built, dtype)


RESAMPLED = ["vit", "deit_distilled", "clip_projected", "siglip_tower", "siglip_classifier"]


@pytest.mark.parametrize("name", RESAMPLED)
def test_another_input_size_is_what_transformers_interpolates(name: str, tmp_path: Path) -> None:
    case = BY_ID[name]
    model = theirs(case)
    model.save_pretrained(tmp_path)
    _, built = ours(tmp_path, input_size=(24, 40))
    pixels = torch.randn(1, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = case.answer(model(pixels, interpolate_pos_encoding=True))
        assert (built(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_input_that_is_no_multiple_of_the_patches(tmp_path: Path) -> None:
    """The convolution leaves out the last pixels; the converted model takes the rest."""
    case = BY_ID["siglip_tower"]
    model = foreign.randomise(
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**MLP | {"image_size": 30}))
    )
    model.save_pretrained(tmp_path)
    transformers.SiglipImageProcessorPil(size={"height": 30, "width": 30}).save_pretrained(tmp_path)
    converted, built = ours(tmp_path)
    assert (converted.data_config.input_size, converted.data_config.crop_mode) == ((24, 24), "squash_top_left")
    pixels = torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = case.answer(model(pixels))
        assert (built(pixels[..., :24, :24]) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", [case.id for case in CASES])
def test_names_of_transformers_5s_modules(name: str, tmp_path: Path) -> None:
    """Files may also have the names that the modules have now."""
    case = BY_ID[name]
    model = theirs(case)
    model.save_pretrained(tmp_path)
    files = read(tmp_path)
    size = {} if case.size == (32, 32) or name == "vit_deep_oblong" else {"input_size": case.size}
    expected, found = (convert(files.config, tensors, **size) for tensors in (files.tensors, model.state_dict()))
    assert expected.weights.keys() == found.weights.keys()
    assert all(torch.equal(expected.weights[key], found.weights[key]) for key in expected.weights)


@pytest.mark.parametrize("name", ["clip_tower", "siglip_tower"])
def test_towers_as_version_4_saved_them(name: str, tmp_path: Path) -> None:
    """With a prefix, and with the numbers of the positions."""
    theirs(BY_ID[name]).save_pretrained(tmp_path)
    files = read(tmp_path)
    old = {f"vision_model.{key}": value for key, value in files.tensors.items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    converted = convert(files.config, old)
    assert converted.notes == ("left out: the numbers of the positions (embeddings.position_ids)",)


def test_indices_of_relative_positions_are_left_out(tmp_path: Path) -> None:
    """transformers 4 saved them."""
    theirs(BY_ID["beit"]).save_pretrained(tmp_path)
    files = read(tmp_path)
    name = "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"
    converted = convert(files.config, {**files.tensors, name: torch.zeros(17, 17)})
    assert "indices of relative positions" in converted.notes[0]


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
    _check(BY_ID["vit"], model, ours(tmp_path)[1], torch.float32)


def test_a_pickle_without_code(tmp_path: Path) -> None:
    model = theirs(BY_ID["clip"])
    model.save_pretrained(tmp_path)
    torch.save(read(tmp_path).tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    _check(BY_ID["clip"], model, ours(tmp_path)[1], torch.float32)


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
