"""Models of other libraries, from settings to a loaded model: names, tasks, preprocessing, heads, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import timm
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from open_clip.model import CLIP, CustomTextCLIP
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from cdam_server.compute import foreign
from cdam_server.compute.loading import LoadedModel, load_model
from cdam_server.settings.load_error import LoadError
from cdam_server.settings.specs import ModelSpec, Task, check_files, load_models_file
from foreign_models import SIZES, TEXT, difference, load, refusal, spec

transformers.utils.logging.disable_progress_bar()

LABELS = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
TV_SIZES = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 60}
CLIP_VISION = {"image_size": 32, "patch_size": 8, "layers": 1, "width": 128}
PREPROCESSING = {
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "interpolation": "bilinear",
    "crop_pct": 0.5,
    "crop_mode": "center",
}


def vit(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, intermediate_size=60, **{**LABELS, **config})
    ).eval()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder as transformers' users save it."""
    folder = tmp_path / "pets"
    vit().save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(folder)
    return folder


@pytest.fixture
def clip() -> nn.Module:
    torch.manual_seed(0)
    return CLIP(24, vision_cfg=CLIP_VISION, text_cfg=TEXT, quick_gelu=True).eval()


def same(loaded: LoadedModel, answer: Callable[[torch.Tensor], torch.Tensor], size: int = 32) -> bool:
    return difference(loaded, answer, (size, size)) <= 1e-5


# --- transformers


def test_all_that_the_files_say_is_the_models(pets: Path) -> None:
    loaded = load(f"local-dir:{pets}")
    assert same(loaded, lambda pixels: vit()(pixels).logits)
    assert loaded.architecture == "transformers:ViTForImageClassification"
    assert loaded.output_names == ("cat", "dog", "owl")
    assert loaded.output_count == 3
    assert loaded.task is Task.MULTI_CLASS
    config = loaded.data_config
    assert (config.input_size, config.crop_mode, config.crop_pct) == ((32, 32), "squash", 1.0)
    assert config.mean == pytest.approx((0.4, 0.4, 0.4))
    assert config.interpolation == "bilinear"
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_settings_go_before_the_files(pets: Path) -> None:
    loaded = load(f"local-dir:{pets}", outputs=["a", "b", "c"], task="multi_label", preprocessing=PREPROCESSING)
    assert loaded.output_names == ("a", "b", "c")
    assert loaded.task is Task.MULTI_LABEL
    assert (loaded.data_config.mean, loaded.data_config.crop_mode) == ((0.1, 0.2, 0.3), "center")
    overlaid = load(f"local-dir:{pets}", model_kwargs={"pretrained_cfg_overlay": {"mean": [0.9, 0.9, 0.9]}})
    assert overlaid.data_config.mean == (0.9, 0.9, 0.9)
    assert overlaid.data_config.interpolation == "bilinear"


@pytest.mark.parametrize(("problem", "task"), [("multi_label_classification", "multi_label"), (None, "multi_class")])
def test_the_task_is_the_files(problem: str | None, task: str, pets: Path) -> None:
    config = json.loads((pets / "config.json").read_text())
    (pets / "config.json").write_text(json.dumps({**config, "problem_type": problem}))
    assert load(f"local-dir:{pets}").task == task
    assert load(f"local-dir:{pets}", task="multi_class").task is Task.MULTI_CLASS


def test_one_output_that_is_a_regression(tmp_path: Path) -> None:
    model = vit(id2label={0: "age"}, label2id={"age": 0}, problem_type="regression")
    model.save_pretrained(tmp_path)
    loaded = load(f"local-dir:{tmp_path}", preprocessing=PREPROCESSING)
    assert (loaded.task, loaded.output_names) == (Task.REGRESSION, ("age",))


def test_without_a_processor_preprocessing_must_be_said(pets: Path) -> None:
    (pets / "preprocessor_config.json").unlink()
    message = refusal(f"local-dir:{pets}", preprocessing={"mean": [0.5, 0.5, 0.5], "crop_pct": 1.0})
    assert "preprocessing: no file says how images are prepared, and std, interpolation, crop_mode must not" in message
    loaded = load(f"local-dir:{pets}", preprocessing=PREPROCESSING)
    assert loaded.data_config.crop_pct == 0.5


def test_eps_activation_and_preprocessing_are_in_the_fingerprint(pets: Path) -> None:
    def changed(file: str, **values: Any) -> str:
        content = json.loads((pets / file).read_text())
        (pets / file).write_text(json.dumps({**content, **values}))
        found = load(f"local-dir:{pets}").fingerprint
        (pets / file).write_text(json.dumps(content))
        return found

    prints = [
        load(f"local-dir:{pets}").fingerprint,
        changed("config.json", layer_norm_eps=1e-6),
        changed("config.json", hidden_act="quick_gelu"),
        changed("preprocessor_config.json", resample=3),
    ]
    assert len(set(prints)) == 4
    assert changed("config.json", transformers_version="9") == prints[0]
    assert load(f"local-dir:{pets}", dynamic_img_size=False).fingerprint == prints[0]


def test_heads_on_one_backbone_share_its_trunk(pets: Path, tmp_path: Path) -> None:
    """Two folders of the same backbone with other classifiers, and a third model with a head of one's own."""
    other = vit(id2label=dict(enumerate("abcd")), label2id={})
    other.vit = vit().vit
    other.save_pretrained(tmp_path / "other")
    save_file({"weight": torch.ones(2, 48)}, tmp_path / "head.safetensors")
    loaded = [
        load(f"local-dir:{pets}", preprocessing=PREPROCESSING),
        load(f"local-dir:{tmp_path / 'other'}", preprocessing=PREPROCESSING),
        load(f"local-dir:{pets}", head=tmp_path / "head.safetensors", preprocessing=PREPROCESSING),
    ]
    assert [its.output_count for its in loaded] == [3, 4, 2]
    assert len({its.trunk_fingerprint for its in loaded}) == 1
    assert len({its.fingerprint for its in loaded}) == 3


def test_a_head_of_ones_own(pets: Path, tmp_path: Path) -> None:
    head = {"weight": torch.randn(2, 48, generator=torch.Generator().manual_seed(0)), "bias": torch.zeros(2)}
    save_file(head, tmp_path / "head.safetensors")
    loaded = load(f"local-dir:{pets}", head=tmp_path / "head.safetensors")
    assert (loaded.output_count, loaded.output_names) == (2, ())

    def answer(pixels: torch.Tensor) -> torch.Tensor:
        return vit().vit(pixels).last_hidden_state[:, 0] @ head["weight"].T

    assert same(loaded, answer)


def test_the_classifier_may_be_left_out(pets: Path) -> None:
    loaded = load(f"local-dir:{pets}", num_outputs=0)
    assert (loaded.output_count, loaded.output_names) == (0, ())
    assert same(loaded, lambda pixels: vit().vit(pixels).last_hidden_state[:, 0])
    assert "num_outputs: 7 are asked for, but the head has 3" in refusal(f"local-dir:{pets}", num_outputs=7)


def test_a_classifier_of_several_layers_is_refused_or_replaced(pets: Path, tmp_path: Path) -> None:
    model = vit()
    model.classifier = nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))
    model.save_pretrained(pets)
    folder = f"local-dir:{pets}"
    message = refusal(folder)
    assert (
        "architecture: the classifier is not one linear layer, and its activations are in no file: give one" in message
    )
    assert message.endswith("(classifier.0.bias, classifier.0.weight, classifier.2.bias and 1 more)")
    message = refusal(folder, head_layers=["linear", "relu", "linear"])
    assert "head_layers: of a converted model only a linear classifier is read" in message
    bare = load(folder, num_outputs=0)
    assert (bare.output_count, bare.output_names) == (0, ())
    assert bare.weights.notes[0].startswith(
        "left out: the classifier, for which another or none is asked (classifier.0"
    )
    save_file(
        {name.removeprefix("classifier."): x for name, x in model.state_dict().items() if "classifier" in name},
        tmp_path / "head.safetensors",
    )
    layers = ["linear", "relu", "linear"]
    loaded = load(folder, head=tmp_path / "head.safetensors", head_layers=layers, outputs=["a", "b", "c"])
    assert same(loaded, lambda pixels: model(pixels).logits)


def test_another_head_takes_what_the_classifier_took(tmp_path: Path) -> None:
    """DINOv2's reads [CLS] and the patches' mean."""
    torch.manual_seed(0)
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZES, **LABELS)).eval()
    model.save_pretrained(tmp_path)
    save_file(
        {"weight": model.classifier.weight.data[:2].clone(), "bias": torch.ones(2)}, tmp_path / "head.safetensors"
    )
    loaded = load(f"local-dir:{tmp_path}", head=tmp_path / "head.safetensors", preprocessing=PREPROCESSING)
    assert same(loaded, lambda pixels: model(pixels).logits[:, :2] + 1)


def test_a_head_on_a_projection_takes_the_embedding(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**SIZES, intermediate_size=60, projection_dim=20)
    torch.manual_seed(0)
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "clip")
    head = {"weight": torch.randn(2, 20, generator=torch.Generator().manual_seed(0))}
    save_file(head, tmp_path / "head.safetensors")
    settings = {"preprocessing": PREPROCESSING}
    loaded = load(f"local-dir:{tmp_path / 'clip'}", head=tmp_path / "head.safetensors", **settings)
    assert same(loaded, lambda pixels: model(pixels).image_embeds @ head["weight"].T)
    bare = load(f"local-dir:{tmp_path / 'clip'}", **settings)
    assert bare.output_count == 0
    assert same(bare, lambda pixels: model(pixels).image_embeds)


def test_dinov2_is_resampled_to_what_its_processor_makes_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZES | {"image_size": 56}, **LABELS))
    model.eval().save_pretrained(tmp_path)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    loaded = load(f"local-dir:{tmp_path}")
    assert loaded.resampled == "positions from those for 56 x 56 pixels to those for 32 x 32"
    assert (loaded.data_config.input_size, loaded.data_config.crop_mode) == ((32, 32), "center_floor")
    assert loaded.data_config.crop_pct == pytest.approx(32 / 36)
    assert same(loaded, lambda pixels: model(pixels).logits)
    other = load(f"local-dir:{tmp_path}", input_size=(56, 56))
    assert other.resampled == ""
    assert other.data_config.input_size == (56, 56)
    assert same(other, lambda pixels: model(pixels).logits, size=56)


def test_other_input_sizes_at_run_time_only_where_they_are_exact(tmp_path: Path, pets: Path) -> None:
    config = transformers.DINOv3ViTConfig(**SIZES, intermediate_size=60)
    model = transformers.DINOv3ViTModel(config).eval()
    model.save_pretrained(tmp_path / "rotary")
    rotary = spec(f"local-dir:{tmp_path / 'rotary'}", preprocessing=PREPROCESSING)
    assert same(load_model(rotary), lambda pixels: model(pixels).pooler_output, size=48)
    assert load_model(rotary).module.dynamic_img_size
    assert not load_model(rotary.model_copy(update={"dynamic_img_size": False})).module.dynamic_img_size
    assert not load(f"local-dir:{pets}").module.dynamic_img_size


def test_refusals_name_the_setting(pets: Path, tmp_path: Path) -> None:
    folder = f"local-dir:{pets}"
    assert "model_kwargs: a converted model has its sizes from its files: leave depth, num_heads out" in refusal(
        folder, model_kwargs={"depth": 3, "num_heads": 2}
    )
    assert "input_size: 30 x 32 pixels is no multiple of the patch size 8 x 8" in refusal(folder, input_size=(30, 32))
    assert "checkpoint: local-dir:" in refusal(folder, checkpoint=pets / "model.safetensors")
    assert "random_weights: local-dir:" in refusal(folder, random_weights=True)
    config = json.loads((pets / "config.json").read_text())
    (pets / "config.json").write_text(json.dumps({**config, "model_type": "swin"}))
    assert "architecture: model_type is swin: Swin merges patches" in refusal(folder)
    (pets / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    assert "architecture: hidden_size 48 is no multiple of num_attention_heads 5" in refusal(folder)


def test_a_folder_of_transformers_is_no_checkpoint_of_timms(pets: Path) -> None:
    hint = f"is a folder of transformers: leave it out, and say local-dir:{pets} as the architecture"
    assert hint in refusal("vit_base_patch16_224", checkpoint=pets)
    assert hint in refusal("vit_base_patch16_224", checkpoint=f"local-dir:{pets}")


def test_folders_are_looked_at_before_anything_is_built(pets: Path, tmp_path: Path) -> None:
    check_files([spec(f"local-dir:{pets}")])
    with pytest.raises(LoadError, match=f"architecture: {pets} is a folder: say local-dir:{pets}"):
        check_files([ModelSpec(name="m", architecture=str(pets), random_weights=True)])
    with pytest.raises(
        LoadError, match=r"architecture: there is no .*config\.json: local-dir:PATH names a folder that"
    ):
        check_files([spec(f"local-dir:{tmp_path}")])


def test_in_a_models_file_folders_are_relative_to_it(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("models: [{name: pets, architecture: 'local-dir:pets'}]")
    (only,) = load_models_file(tmp_path / "models.yaml")
    assert load_model(only).output_names == ("cat", "dog", "owl")


def test_a_folder_that_timm_wrote_stays_timms(tmp_path: Path) -> None:
    """Both have a config.json."""
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=3), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "test_vit"
    assert load(f"local-dir:{tmp_path}").architecture == "test_vit"


# --- the hub


class Hub:
    """Stands for the hub: repositories are folders, and what is asked for is copied."""

    def __init__(self, repositories: Path, cache: Path) -> None:
        self.repositories, self.cache = repositories, cache
        self.asked: list[str] = []

    def download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        self.asked.append(f"{repo_id}@{revision or 'main'}/{filename}")
        if not (self.repositories / repo_id).is_dir():
            raise LocalEntryNotFoundError("no network")
        if not (self.repositories / repo_id / filename).is_file():
            raise EntryNotFoundError(filename)
        target = self.cache / repo_id
        target.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(self.repositories / repo_id / filename, target))

    def snapshot(self, repo_id: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        for pattern in allow_patterns:
            for path in (self.repositories / repo_id).glob(pattern):
                self.download(repo_id, path.name, revision=revision)
        return str(self.cache / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot)
    return made


def test_a_repository_of_transformers(hub: Hub, pets: Path) -> None:
    shutil.copytree(pets, hub.repositories / "org" / "pets")
    (hub.repositories / "org" / "pets" / "pytorch_model.bin").write_bytes(b"the same again, which is not fetched")
    (hub.repositories / "org" / "pets" / "README.md").write_text("not fetched either")
    loaded = load("hf-hub:org/pets@v2")
    assert loaded.output_names == ("cat", "dog", "owl")
    assert set(hub.asked) == {
        f"org/pets@v2/{name}" for name in ("config.json", "preprocessor_config.json", "model.safetensors")
    }


def test_a_repository_with_a_pickle_alone(hub: Hub, pets: Path) -> None:
    repository = hub.repositories / "org" / "pets"
    shutil.copytree(pets, repository)
    torch.save(vit().state_dict(), repository / "pytorch_model.bin")
    (repository / "model.safetensors").unlink()
    assert same(load("hf-hub:org/pets"), lambda pixels: vit()(pixels).logits)


def test_of_what_can_t_be_converted_no_weights_are_fetched(hub: Hub) -> None:
    """The configuration is looked at first."""
    repository = hub.repositories / "org" / "windows"
    repository.mkdir(parents=True)
    (repository / "config.json").write_text('{"model_type": "swin"}')
    (repository / "model.safetensors").write_bytes(b"large")
    assert "architecture: model_type is swin: Swin merges patches" in refusal("hf-hub:org/windows")
    assert hub.asked == ["org/windows@main/config.json"]


def test_timms_repositories_are_left_to_timm(hub: Hub) -> None:
    for name, files in {"timm": {"config.json": '{"architecture": "vit_tiny_patch16_224"}'}, "empty": {}}.items():
        (hub.repositories / "org" / name).mkdir(parents=True)
        for file, content in files.items():
            (hub.repositories / "org" / name / file).write_text(content)
        assert foreign.converted_of(spec(f"hf-hub:org/{name}")) is None


def test_no_network(hub: Hub) -> None:
    message = refusal("hf-hub:org/nowhere")
    assert "architecture: the files of hf-hub:org/nowhere did not come from the hub" in message
    assert message.endswith("without network give local-dir:PATH")


# --- torchvision


@pytest.fixture
def torchvision_file(tmp_path: Path) -> Path:
    torch.save(_torchvision().state_dict(), tmp_path / "tv.pth")
    return tmp_path / "tv.pth"


def _torchvision() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(**TV_SIZES, num_classes=4)
    nn.init.normal_(model.heads.head.weight)
    return model.eval()


def test_a_checkpoint_of_torchvision(torchvision_file: Path) -> None:
    settings = {"checkpoint": torchvision_file, "preprocessing": PREPROCESSING}
    loaded = load("torchvision:VisionTransformer", model_kwargs={"num_heads": 3}, **settings)
    assert same(loaded, _torchvision())
    assert loaded.architecture == "torchvision:VisionTransformer"
    assert loaded.weights.source == str(torchvision_file)
    message = refusal("torchvision:VisionTransformer", **settings)
    assert "checkpoint: these are weights of torchvision's VisionTransformer, of width 48" in message
    assert message.endswith("say num_heads in model_kwargs")
    message = refusal("torchvision:vit_b_16", **settings)
    assert "checkpoint: vit_b_16 has width 768 and patches of 16 pixels, but the checkpoint has 48 and 8" in message


WRAPPED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "container": lambda weights: {"model": weights, "epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}},
    "lightning": lambda weights: {"state_dict": {f"net.{name}": tensor for name, tensor in weights.items()}},
    "parallel": lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
    "compiled": lambda weights: {f"_orig_mod.{name}": tensor for name, tensor in weights.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_training_wrappers_of_other_libraries_models(wrapping: str, tmp_path: Path) -> None:
    """Unlike timm's names, `encoder.` belongs to torchvision's."""
    torch.save(WRAPPED[wrapping](_torchvision().state_dict()), tmp_path / "w.pth")
    kwargs = {"num_heads": 3}
    settings = {"checkpoint": tmp_path / "w.pth", "model_kwargs": kwargs, "preprocessing": PREPROCESSING}
    assert same(load("torchvision:VisionTransformer", **settings), _torchvision())


def test_a_torchvision_classifier_of_several_layers(tmp_path: Path) -> None:
    model = _torchvision()
    model.heads = nn.Sequential(nn.Linear(48, 8), nn.GELU(), nn.Linear(8, 2))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    settings = {"checkpoint": tmp_path / "w.pth", "model_kwargs": {"num_heads": 3}, "preprocessing": PREPROCESSING}
    message = refusal("torchvision:VisionTransformer", **settings)
    assert "checkpoint: the classifier is not one linear layer" in message
    loaded = load("torchvision:VisionTransformer", num_outputs=0, **settings)
    model.heads = nn.Identity()
    assert same(loaded, model)


def test_several_networks_and_what_stands_beside_one(tmp_path: Path) -> None:
    weights = _torchvision().state_dict()
    file = tmp_path / "w.pth"
    settings = {"checkpoint": file, "model_kwargs": {"num_heads": 3}, "preprocessing": PREPROCESSING}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    torch.save({"student": zeros, "teacher": weights}, file)
    message = refusal("torchvision:VisionTransformer", **settings)
    assert f"checkpoint: {file} holds several networks: say weights_key: student or teacher" in message
    chosen = load("torchvision:VisionTransformer", weights_key="teacher", **settings)
    assert same(chosen, _torchvision())
    message = refusal("torchvision:VisionTransformer", weights_key="ema", **settings)
    assert f"{file} holds no model of torchvision under 'ema'" in message
    torch.save({"model": weights, "classifier": {"weight": torch.zeros(2, 4)}}, file)
    assert "holds more than model.*: classifier.weight" in refusal("torchvision:VisionTransformer", **settings)


def test_architectures_of_other_libraries_need_a_checkpoint(torchvision_file: Path) -> None:
    message = refusal("torchvision:vit_b_16", random_weights=True)
    assert "architecture: torchvision:vit_b_16 needs its weights: give them as the checkpoint" in message
    with pytest.raises(
        ValidationError, match=r"give one source of weights: .*; torchvision:vit_b_16 needs a checkpoint"
    ):
        spec("torchvision:vit_b_16")
    with pytest.raises(ValidationError, match=f"; for the folder say local-dir:{torchvision_file.parent}"):
        spec(str(torchvision_file.parent))
    message = refusal("vit_b_16", checkpoint=torchvision_file)
    assert message.endswith("architecture: vit_b_16 is torchvision's: say torchvision:vit_b_16, with a checkpoint")
    message = refusal("torchvision:swin_t", checkpoint=torchvision_file)
    assert "architecture: torchvision has no Vision Transformer 'swin_t', but vit_b_16, vit_b_32" in message
    message = refusal("open_clip:RN50", checkpoint=torchvision_file)
    assert "architecture: open_clip's RN50 is not known here" in message
    message = refusal("open_clip:ViT-B-32", checkpoint=torchvision_file)
    assert "checkpoint: " in message
    assert "holds no model of open_clip: there is no visual.conv1.weight, but class_token" in message


def test_timms_architecture_lacks_what_the_files_of_others_do_not_say(
    torchvision_file: Path, clip: nn.Module, tmp_path: Path
) -> None:
    message = refusal("vit_base_patch16_224", checkpoint=torchvision_file)
    assert (
        "holds a model of torchvision, and not all of it is in the file: name its architecture, such as tor" in message
    )
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "clip.pt")
    message = refusal("vit_base_patch32_clip_224", checkpoint=tmp_path / "clip.pt")
    assert "holds a model of open_clip, and not all of it is in the file: name its architecture, such as ope" in message
    torch.save({"state_dict": {f"model.{k}": v for k, v in vit().state_dict().items()}}, tmp_path / "lightning.ckpt")
    message = refusal("vit_base_patch16_224", checkpoint=tmp_path / "lightning.ckpt")
    assert message.endswith("name its folder, with config.json, as the architecture: local-dir:PATH")


# --- open_clip


def test_a_checkpoint_of_open_clip(clip: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "epoch_3.pt"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, file)
    loaded = load("open_clip:ViT-B-8-quickgelu", checkpoint=file)
    assert same(loaded, clip.encode_image)
    assert loaded.output_count == 0
    assert loaded.architecture == "open_clip:ViT-B-8-quickgelu"
    assert loaded.weights.notes[0].startswith("images are prepared as open_clip does it")
    assert loaded.weights.notes[1].startswith("left out: the text tower (")
    assert loaded.text is not None
    assert loaded.text.logit_scale == pytest.approx(clip.logit_scale.item())
    assert (loaded.data_config.input_size, loaded.data_config.crop_pct) == ((32, 32), 1.0)
    assert loaded.data_config.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    other = load("open_clip:ViT-B-8", checkpoint=file)
    assert not same(other, clip.encode_image)
    assert other.fingerprint != loaded.fingerprint


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_folder_of_open_clip(safe: bool, clip: nn.Module, tmp_path: Path) -> None:
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": CLIP_VISION, "text_cfg": TEXT, "quick_gelu": True},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bilinear"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    if safe:
        save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    else:
        torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    check_files([spec(f"local-dir:{tmp_path}")])
    loaded = load(f"local-dir:{tmp_path}")
    assert same(loaded, clip.encode_image)
    assert (loaded.data_config.mean, loaded.data_config.crop_mode) == ((0.5, 0.5, 0.5), "squash")


def test_a_repository_of_open_clip(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories / "org" / "siglip"
    repository.mkdir(parents=True)
    vision = {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"}
    torch.manual_seed(0)
    model = CustomTextCLIP(96, vision_cfg=vision, text_cfg=TEXT).eval()
    save_file(model.state_dict(), repository / "open_clip_model.safetensors")
    (repository / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    loaded = load("hf-hub:org/siglip")
    assert same(loaded, model.encode_image, size=160)
