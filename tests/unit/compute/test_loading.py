"""Models from settings: every source of weights, heads and names, and errors that say what to change."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from cdam_engine import Explainer
from cdam_engine.fingerprint import fingerprint
from cdam_engine.preprocess import normalise, prepare
from cdam_server.compute.loading import LoadedModel, LoadError, ModelSpec, Task, load_model, load_models_file

SMALL: dict[str, Any] = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}
ARCHITECTURE = "vit_tiny_patch16_224"


def small(num_classes: int = 3, architecture: str = ARCHITECTURE, seed: int = 1, **kwargs: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(architecture, num_classes=num_classes, **{**SMALL, **kwargs})
    return model.eval()


def spec(**settings: Any) -> ModelSpec:
    return ModelSpec(**{"name": "m", "architecture": ARCHITECTURE, "model_kwargs": SMALL, **settings})


def failure(**settings: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load_model(spec(**settings))
    assert str(caught.value).startswith("model 'm': ")
    return caught.value


def same(loaded: LoadedModel, model: nn.Module) -> bool:
    own, other = loaded.module.state_dict(), model.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(small().state_dict(), path)
    return path


# --- checkpoints


def test_safetensors(checkpoint: Path) -> None:
    loaded = load_model(spec(checkpoint=checkpoint))
    assert same(loaded, small())
    assert (loaded.name, loaded.architecture, loaded.task) == ("m", ARCHITECTURE, Task.MULTI_CLASS)
    assert loaded.output_count == 3
    assert loaded.output_names == ()
    assert loaded.data_config.input_size == (32, 32)
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert loaded.module(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_other_input_sizes_can_be_asked_for_unless_switched_off(checkpoint: Path) -> None:
    flexible = load_model(spec(checkpoint=checkpoint))
    assert flexible.module(torch.zeros(1, 3, 48, 64)).shape == (1, 3)
    fixed = load_model(spec(checkpoint=checkpoint, dynamic_img_size=False))
    assert not getattr(fixed.module, "dynamic_img_size", False)
    assert fixed.fingerprint == flexible.fingerprint


def test_position_embeddings_are_resampled_to_the_input_size(checkpoint: Path) -> None:
    kwargs = {name: value for name, value in SMALL.items() if name != "img_size"}
    loaded = load_model(spec(checkpoint=checkpoint, input_size=(48, 64), model_kwargs=kwargs))
    assert loaded.data_config.input_size == (48, 64)
    assert loaded.module(torch.zeros(1, 3, 48, 64)).shape == (1, 3)


WRAPPED: dict[str, Any] = {
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "model": lambda weights: {"model": weights, "args": argparse.Namespace(lr=0.1)},
    "model_state_dict": lambda weights: {"model_state_dict": weights, "optimizer": {"state": {}}},
    "average first": lambda weights: {
        "state_dict": {name: torch.zeros_like(tensor) for name, tensor in weights.items()},
        "state_dict_ema": weights,
    },
    "data-parallel": lambda weights: {"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}},
    "compiled": lambda weights: {f"_orig_mod.{name}": tensor for name, tensor in weights.items()},
    "lightning": lambda weights: {"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}},
    "backbone and head": lambda weights: {
        name if name.startswith("head.") else f"backbone.{name}": tensor for name, tensor in weights.items()
    },
    "half precision": lambda weights: {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_pickled_checkpoints(wrapping: str, suffix: str, tmp_path: Path) -> None:
    model = small()
    path = tmp_path / f"weights{suffix}"
    torch.save(WRAPPED[wrapping](model.state_dict()), path)
    loaded = load_model(spec(checkpoint=path))
    assert next(loaded.module.parameters()).dtype == torch.float32
    if wrapping == "half precision":
        model = model.bfloat16().float()
    assert same(loaded, model)


def test_dino_checkpoints(tmp_path: Path) -> None:
    backbone = small(0)
    teacher = {f"module.backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    teacher |= {"module.head.mlp.0.weight": torch.ones(4, 32), "module.head.last_layer.weight_g": torch.ones(4, 1)}
    path = tmp_path / "dino.pth"
    torch.save({"student": {}, "teacher": teacher, "epoch": 1, "args": argparse.Namespace(arch="vit_small")}, path)
    loaded = load_model(spec(checkpoint=path))
    assert same(loaded, backbone)
    assert loaded.output_count == 0


@pytest.mark.parametrize("architecture", ["deit3_small_patch16_224"])
def test_foreign_names_are_converted_by_timm(architecture: str, tmp_path: Path) -> None:
    model = small(architecture=architecture)
    foreign = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in model.state_dict().items()
    }
    assert foreign.keys() != model.state_dict().keys()
    torch.save({"model": foreign}, tmp_path / "w.pth")
    assert same(load_model(spec(architecture=architecture, checkpoint=tmp_path / "w.pth")), model)


@pytest.mark.parametrize(
    "architecture", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "deit_tiny_distilled_patch16_224"]
)
def test_other_families(architecture: str, tmp_path: Path) -> None:
    kwargs = {**SMALL, "img_size": 28 if "14" in architecture else 32}
    model = small(architecture=architecture, **kwargs)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    settings = {"architecture": architecture, "model_kwargs": kwargs, "checkpoint": tmp_path / "w.safetensors"}
    assert same(load_model(spec(**settings)), model)


def test_a_headless_checkpoint_serves_concepts_only(tmp_path: Path) -> None:
    save_file(small(0).state_dict(), tmp_path / "w.safetensors")
    loaded = load_model(spec(checkpoint=tmp_path / "w.safetensors"))
    assert (loaded.output_count, loaded.output_names) == (0, ())


def test_a_head_can_be_left_out(checkpoint: Path) -> None:
    loaded = load_model(spec(checkpoint=checkpoint, num_outputs=0))
    assert loaded.output_count == 0
    assert "head.weight" not in loaded.module.state_dict()


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_files(part: float, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    weights = small().state_dict()
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    error = failure(checkpoint=path)
    assert error.setting == "checkpoint"
    assert "damaged" in error.message


class Surprise:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_need_code_are_refused(zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Surprise()}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    message = failure(checkpoint=tmp_path / "w.pth").message
    assert "needs code" in message
    assert "safetensors.torch.save_file" in message
    assert "print" in message or not zipped
    assert "code ran" not in capsys.readouterr().out


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "w.pth")
    assert "safetensors.torch.save_file" in failure(checkpoint=tmp_path / "w.pth").message


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], torch.ones(3), {"model": {"a": 1}}])
def test_checkpoints_without_weights(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert "no weights" in failure(checkpoint=tmp_path / "w.pth").message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "no file" in failure(checkpoint=tmp_path / "w.pth").message


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"x")
    assert ".safetensors" in failure(checkpoint=tmp_path / "w.onnx").message


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    weights = small().state_dict()
    weights["norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "w.safetensors")
    assert "norm.weight" in failure(checkpoint=tmp_path / "w.safetensors").message


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    weights = small(depth=2).state_dict()
    weights["cls_token"] = torch.zeros(1, 1, 16)
    del weights["norm.bias"]
    save_file(weights, tmp_path / "w.safetensors")
    message = failure(checkpoint=tmp_path / "w.safetensors").message
    assert "missing norm.bias" in message
    assert "unexpected blocks.1.attn.proj.bias" in message
    assert "and 7 more" in message
    assert "cls_token (1, 1, 16) in place of (1, 1, 32)" in message


def test_another_number_of_outputs_than_in_the_checkpoint(checkpoint: Path) -> None:
    assert "head.weight (3, 32) in place of (5, 32)" in failure(checkpoint=checkpoint, num_outputs=5).message


# --- heads


@pytest.mark.parametrize("prefix", ["", "head.", "fc.", "linear.", "classifier."])
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_of_ones_own(prefix: str, bias: bool, checkpoint: Path, tmp_path: Path) -> None:
    weight, offset = torch.randn(5, 32), torch.randn(5)
    save_file({f"{prefix}weight": weight} | ({f"{prefix}bias": offset} if bias else {}), tmp_path / "head.safetensors")
    loaded = load_model(spec(checkpoint=checkpoint, head=tmp_path / "head.safetensors", outputs=list("abcde")))
    image = torch.randn(2, 3, 32, 32)
    backbone = small()
    latent = backbone.forward_head(backbone.forward_features(image), pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(loaded.module(image), latent @ weight.T + (offset if bias else 0))
    assert loaded.output_names == tuple("abcde")
    assert loaded.output_count == 5
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"weight": torch.zeros(5, 31)}, "latents of 31, the architecture's have 32"),
        ({"weight": torch.zeros(5, 32), "bias": torch.zeros(4)}, "(5, 32) and (4,)"),
        ({"weight": torch.zeros(32)}, "(32,)"),
        ({"kernel": torch.zeros(5, 32)}, "kernel"),
        ({"weight": torch.zeros(5, 32), "other": torch.zeros(1)}, "more than a linear head: other"),
    ],
)
def test_heads_that_do_not_fit(tensors: dict[str, Tensor], complaint: str, checkpoint: Path, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "head.safetensors")
    error = failure(checkpoint=checkpoint, head=tmp_path / "head.safetensors")
    assert error.setting == "head"
    assert complaint in error.message


def test_a_distilled_model_takes_no_single_head(tmp_path: Path) -> None:
    architecture = "deit_tiny_distilled_patch16_224"
    save_file(small(architecture=architecture).state_dict(), tmp_path / "w.safetensors")
    save_file({"weight": torch.zeros(5, 32)}, tmp_path / "head.safetensors")
    settings = {"checkpoint": tmp_path / "w.safetensors", "head": tmp_path / "head.safetensors"}
    assert "single linear head" in failure(architecture=architecture, **settings).message


# --- names and tasks


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.txt", "cat\ndog\nred fox\n"),
        ("names.txt", "\ufeffcat\r\n dog \r\nred fox\r\n\r\n"),
        ("names.json", '["cat", "dog", "red fox"]'),
        ("names.json", '{"2": "red fox", "0": "cat", "1": "dog"}'),
        ("names.json", '{"0": ["n01", "cat"], "1": ["n02", "dog"], "2": ["n03", "red fox"]}'),
        ("names.json", '{"dog": 1, "cat": 0, "red fox": 2}'),
    ],
)
def test_names_from_a_file(file: str, content: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    loaded = load_model(spec(checkpoint=checkpoint, outputs=tmp_path / file))
    assert loaded.output_names == ("cat", "dog", "red fox")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.txt", ""),
        ("names.txt", "cat\n\ndog"),
        ("names.txt", "cat\ndog"),
        ("names.json", "[]"),
        ("names.json", "{}"),
        ("names.json", "3"),
        ("names.json", '["cat", "dog", 3]'),
        ("names.json", '{"0": "cat", "1": "dog", "3": "red fox"}'),
        ("names.json", '{"zero": "cat"}'),
        ("names.json", '{"cat": 0, "dog": 0, "red fox": 1}'),
        ("names.json", '{"0": []}'),
        ("names.json", '["cat", "dog"'),
    ],
)
def test_names_that_are_wrong(file: str, content: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    assert failure(checkpoint=checkpoint, outputs=tmp_path / file).setting == "outputs"


def test_names_that_are_not_there(checkpoint: Path, tmp_path: Path) -> None:
    assert failure(checkpoint=checkpoint, outputs=tmp_path / "names.txt").setting == "outputs"


def test_names_may_repeat(checkpoint: Path) -> None:
    assert load_model(spec(checkpoint=checkpoint, outputs=["crane", "crane", "x"])).output_names[0] == "crane"


def test_imagenet_names_on_demand(tmp_path: Path) -> None:
    save_file(small(1000).state_dict(), tmp_path / "w.safetensors")
    loaded = load_model(spec(checkpoint=tmp_path / "w.safetensors", outputs="imagenet-1k"))
    assert loaded.output_names[0].startswith("tench")
    assert len(loaded.output_names) == 1000
    assert load_model(spec(checkpoint=tmp_path / "w.safetensors")).output_names == ()


@pytest.mark.parametrize(("outputs", "task"), [(1, "binary"), (1, "regression"), (3, "regression"), (3, "multi_label")])
def test_tasks(outputs: int, task: str) -> None:
    assert load_model(spec(random_weights=True, num_outputs=outputs, task=task)).task == task


@pytest.mark.parametrize(("outputs", "task"), [(1, "multi_class"), (1, "multi_label"), (3, "binary"), (0, "binary")])
def test_tasks_that_do_not_fit_the_outputs(outputs: int, task: str) -> None:
    assert failure(random_weights=True, num_outputs=outputs, task=task).setting == "task"


# --- architectures and the hub


def test_an_unknown_architecture() -> None:
    error = failure(architecture="vit_tiny_patch16_225", random_weights=True)
    assert error.setting == "architecture"
    assert "vit_tiny_patch16_224" in error.message


def test_an_unknown_tag() -> None:
    assert failure(architecture=f"{ARCHITECTURE}.none", random_weights=True).setting == "architecture"


def test_keyword_arguments_that_the_architecture_does_not_take() -> None:
    error = failure(random_weights=True, model_kwargs={**SMALL, "depht": 3})
    assert error.setting == "model_kwargs"
    assert "depht" in error.message


def test_sizes_that_the_architecture_does_not_take() -> None:
    error = failure(random_weights=True, model_kwargs={**SMALL, "num_heads": 5})
    assert error.setting == "model_kwargs"
    assert "divisible by num_heads" in error.message


def test_an_architecture_without_weights_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(name for name in timm.list_models("vit_*") if not timm.models.get_pretrained_cfg(name).has_weights)
    assert failure(architecture=name, pretrained=True).setting == "pretrained"


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    error = failure(pretrained=True)
    assert error.setting == "pretrained"
    assert "no route to host" in error.message
    assert "more" not in error.message


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub whose weights are whatever the model was drawn with."""
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)


@pytest.mark.usefixtures("hub")
def test_weights_from_the_hub_have_imagenets_names() -> None:
    loaded = load_model(spec(pretrained=True))
    assert loaded.output_count == 1000
    assert loaded.output_names == tuple(timm.data.ImageNetInfo().label_descriptions())


@pytest.mark.usefixtures("hub")
def test_weights_from_the_hub_with_a_head_of_ones_own(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1000, 32)}, tmp_path / "head.safetensors")
    loaded = load_model(spec(pretrained=True, head=tmp_path / "head.safetensors"))
    assert loaded.output_count == 1000
    assert loaded.output_names == ()


@pytest.mark.usefixtures("hub")
def test_weights_from_the_hub_never_get_a_random_head() -> None:
    assert failure(pretrained=True, num_outputs=5).setting == "num_outputs"
    assert failure(pretrained=True, outputs=["a", "b"]).setting == "outputs"


def test_other_preprocessing(checkpoint: Path) -> None:
    kwargs = {**SMALL, "pretrained_cfg_overlay": {"mean": [0.1, 0.2, 0.3], "crop_pct": 1.0}}
    loaded = load_model(spec(checkpoint=checkpoint, model_kwargs=kwargs))
    assert loaded.data_config.mean == (0.1, 0.2, 0.3)
    assert loaded.data_config.crop_pct == 1.0
    assert loaded.fingerprint != load_model(spec(checkpoint=checkpoint)).fingerprint


def test_a_convolutional_stems_features_are_no_channels_of_an_image() -> None:
    """huggingface/transformers#26908: a hybrid is a model of RGB images, whatever its stem makes of them."""
    kwargs = {"img_size": 64, "depth": 1, "num_classes": 3}
    loaded = load_model(
        ModelSpec(
            name="m", architecture="vit_tiny_r_s16_p8_224", random_weights=True, num_outputs=3, model_kwargs=kwargs
        )
    )
    assert (loaded.data_config.channels, loaded.output_count) == (3, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    explanation = Explainer(loaded.module, data_config=loaded.data_config)(image, 1)
    assert explanation.grid == (2, 2)
    pixels = normalise(torch.from_numpy(prepare(image, loaded.data_config).pixels)[None], loaded.data_config)
    assert explanation.logits == pytest.approx(loaded.module(pixels)[0].numpy(), abs=1e-5)


def test_grey_models_are_served() -> None:
    loaded = load_model(spec(random_weights=True, model_kwargs={**SMALL, "in_chans": 1}))
    assert (loaded.data_config.channels, loaded.data_config.mean) == (1, (0.5,))  # the architecture's, thrice the same
    assert loaded.module(torch.zeros(1, 1, 32, 32)).shape == (1, 1000)


def test_grey_models_need_a_mean_of_their_own() -> None:
    settings: dict[str, Any] = {
        "architecture": "vit_small_patch14_dinov2",
        "random_weights": True,
        "model_kwargs": {**SMALL, "img_size": 28, "in_chans": 1},
    }
    assert "mean has 3 values" in failure(**settings).message
    loaded = load_model(spec(**settings, preprocessing={"mean": [0.4], "std": [0.2]}))
    assert (loaded.data_config.mean, loaded.data_config.std) == ((0.4,), (0.2,))


def test_models_of_other_channels_are_refused() -> None:
    assert "4 channels" in failure(random_weights=True, model_kwargs={**SMALL, "in_chans": 4}).message


def test_random_weights_are_the_same_each_time_and_leave_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second = (load_model(spec(random_weights=True)) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(torch.get_rng_state(), state)


def test_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    from cdam_server.demo import model

    monkeypatch.setattr(model, "load", lambda: model.build().eval())
    loaded = load_model(ModelSpec(name="demo", architecture="demo"))
    assert loaded.architecture == "demo"
    assert loaded.output_names == model.LABELS
    assert loaded.output_count == 10
    assert loaded.data_config.input_size == (64, 64)


def test_a_demo_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise FileNotFoundError("/somewhere")

    monkeypatch.setattr("cdam_server.demo.model.load", load)
    with pytest.raises(LoadError, match="not installed"):
        load_model(ModelSpec(name="demo", architecture="demo"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pretrained": True, "checkpoint": "w.pth"},
        {"pretrained": True, "random_weights": True},
        {"architecture": "demo", "pretrained": True},
        {"architecture": "demo", "outputs": ["a"]},
        {"architecture": "", "pretrained": True},
        {"name": "", "pretrained": True},
        {"pretrained": True, "task": "guess"},
        {"pretrained": True, "input_size": (0, 32)},
        {"pretrained": True, "input_size": (32,)},
        {"pretrained": True, "num_outputs": -1},
        {"pretrained": True, "colour": "red"},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ModelSpec(**{"name": "m", "architecture": ARCHITECTURE, **settings})


# --- fingerprints


def test_a_fingerprint_tells_models_apart(checkpoint: Path, tmp_path: Path) -> None:
    changed = small().state_dict()
    changed["head.bias"][0] += 1e-6
    save_file(changed, tmp_path / "changed.safetensors")
    digests = {
        load_model(settings).fingerprint
        for settings in (
            spec(checkpoint=checkpoint),
            spec(checkpoint=tmp_path / "changed.safetensors"),
            spec(checkpoint=checkpoint, num_outputs=0),
            spec(checkpoint=checkpoint, model_kwargs={**SMALL, "num_heads": 4}),
            spec(checkpoint=checkpoint, model_kwargs={**SMALL, "global_pool": "max", "fc_norm": False}),
            spec(checkpoint=checkpoint, architecture="vit_small_patch16_224"),
        )
    }
    assert len(digests) == 6
    assert all(len(digest) == 64 for digest in digests)


def test_a_fingerprint_depends_on_what_a_model_is_not_on_how_it_was_loaded(checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {f"module.{k}": v for k, v in small().state_dict().items()}}, tmp_path / "w.pth")
    plain = load_model(spec(checkpoint=checkpoint)).fingerprint
    assert load_model(spec(checkpoint=tmp_path / "w.pth")).fingerprint == plain
    assert load_model(spec(name="other", checkpoint=checkpoint, outputs=["a", "b", "c"])).fingerprint == plain
    assert load_model(spec(checkpoint=checkpoint, model_kwargs={**SMALL, "drop_rate": 0.1})).fingerprint == plain
    tagged = f"{ARCHITECTURE}.augreg_in21k_ft_in1k"  # the default tag
    assert load_model(spec(checkpoint=checkpoint, architecture=tagged)).fingerprint == plain


def test_a_fingerprint_is_written_in_stone() -> None:
    module = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.BatchNorm1d(2)})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.5)
    module["b"].bfloat16()
    digest = fingerprint(module, "x", {"pool": "avg", "mean": (0.5,)})
    assert digest == fingerprint(module, "x", {"mean": [0.5], "pool": "avg"})
    assert digest == "2348fefc8739ebfb40fcc693e4c0614cb1457ef840166bc8ef135dd5be21fb77"


def test_fingerprints_agree_between_processes(checkpoint: Path) -> None:
    script = (
        "import json, sys, pathlib\n"
        "from cdam_server.compute.loading import ModelSpec, load_model\n"
        "print(load_model(ModelSpec(**json.loads(sys.argv[1]))).fingerprint)"
    )
    settings = spec(checkpoint=checkpoint)
    run = subprocess.run(
        [sys.executable, "-c", script, settings.model_dump_json()], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == load_model(settings).fingerprint


# --- the models file


def write(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(content)
    return path


def test_a_models_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    path = write(
        tmp_path,
        f"""
        models:
          - name: lesions
            architecture: {ARCHITECTURE}
            checkpoint: {checkpoint.name}
            outputs: names.txt
            task: multi_label
            input_size: [32, 32]
            model_kwargs: {json.dumps({**SMALL, "img_size": 32})}
          - {{name: imagenet, architecture: vit_base_patch16_224, pretrained: true, outputs: imagenet-1k}}
          - {{name: absolute, architecture: vit_base_patch16_224, checkpoint: /weights/w.pth, outputs: [a, b]}}
          - {{name: demo, architecture: demo}}
        """,
    )
    lesions, imagenet, absolute, demo = load_models_file(path)
    assert lesions.checkpoint == checkpoint
    assert load_model(lesions).output_names == ("a", "b", "c")
    assert imagenet.outputs == Path("imagenet-1k")
    assert absolute.checkpoint == Path("/weights/w.pth")
    assert absolute.outputs == ["a", "b"]
    assert demo.architecture == "demo"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "a list of models"),
        ("models: []", "a list of models"),
        ("models: {}", "a list of models"),
        ("models: [{name: a, architecture: demo}]\nother: 1", "one key"),
        ("[1, 2]", "a list of models"),
        ("models: [", "can't be read"),
        ("models: [!!python/object/apply:os.getcwd []]", "can't be read"),
        ("models: [3]", "models[0]"),
        ("models: [{architecture: demo}]", "models[0]: name: must be given"),
        ("models: [{name: a, architecture: demo, colour: 3}]", "models[0] (a): colour: there is no such setting"),
        ("models: [{name: a, architecture: x}]", "models[0] (a): give one source of weights"),
        ("models: [{name: a, architecture: demo, task: guess}]", "models[0] (a): task: must be 'multi_class'"),
        ("models: [{name: a, architecture: demo}, {name: a, architecture: demo}]", "models[1]: name: there is another"),
    ],
)
def test_models_files_that_are_wrong(content: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError) as caught:
        load_models_file(write(tmp_path, content))
    assert complaint in str(caught.value)
    assert caught.value.setting == "models_file"


def test_a_models_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="can't be read"):
        load_models_file(tmp_path / "models.yaml")
