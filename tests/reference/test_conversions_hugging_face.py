"""Checkpoints of transformers, converted, against transformers' own modules: outputs, embeddings and maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from cdam_engine import Concept, Explainer, Output
from cdam_server.compute.conversions.folder import read
from cdam_server.compute.conversions.hugging_face import convert
from reference import foreign
from reference.hugging_face_models import BY_ID, CASES, MLP, Case, ours, theirs

every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def answers(case: Case, model: nn.Module) -> Callable[[Tensor], Tensor]:
    if case.model_class in {"CLIPModel", "SiglipModel"}:
        return lambda pixels: model.get_image_features(pixels).pooler_output
    return lambda pixels: case.answer(model(pixels))


def check(case: Case, model: nn.Module, converted: nn.Module, dtype: torch.dtype) -> None:
    """Outputs, embeddings and maps of one equal the other's."""
    tolerance = 1e-5 if dtype is torch.float32 else case.tolerance
    pixels = torch.randn(2, 3, *case.size, generator=torch.Generator().manual_seed(1)).to(dtype)
    forward = answers(case, model)
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
    check(case, model, built, dtype)


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
