"""What stands beside a network in its file: a classifier is never lost, whatever its name sounds like, nor a scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from cdam_server.compute.weights import LoadError, Wish, load_weights, read_checkpoint

NAME = "vit_tiny_patch16_224"


def _model(outputs: int, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, **options}
    model: nn.Module = timm.create_model(NAME, num_classes=outputs, **settings)
    return model.eval()


TENSORS = {name: tensor + 0.01 for name, tensor in _model(5).state_dict().items()}
HEAD = {name.removeprefix("head."): tensor for name, tensor in TENSORS.items() if name.startswith("head.")}
BACKBONE = {name: tensor for name, tensor in TENSORS.items() if not name.startswith("head.")}


def _below(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{inner}": tensor for inner, tensor in tensors.items()}


def _load(tmp_path: Path, content: object, wish: Wish | None = None) -> nn.Module:
    torch.save(content, tmp_path / "it.pth")
    model = _model(0)
    load_weights(model, read_checkpoint(tmp_path / "it.pth", "checkpoint"), "checkpoint", wish or Wish())
    return model


def _refused(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(LoadError, match=words) as refusal:
        _load(tmp_path, content)
    assert "\n" not in str(refusal.value)


# ArcFace's training code calls its classifier metric_fc.
@pytest.mark.parametrize(
    "name", ["metric_fc", "config_head", "history_head", "optimal", "string_head", "random_forest"]
)
def test_a_classifier_whose_name_sounds_like_training_is_not_lost(tmp_path: Path, name: str) -> None:
    _refused(tmp_path, _below("backbone", BACKBONE) | _below(name, HEAD), f"{name}.weight may be a classifier")


@pytest.mark.parametrize("name", ["projector", "projection_head", "prototypes"])
def test_one_linear_layer_of_an_unclear_name_is_refused_until_it_is_left_out(tmp_path: Path, name: str) -> None:
    content = _below("backbone", BACKBONE) | _below(name, HEAD)
    _refused(tmp_path, content, f"{name} may be a projection, or the classifier.* num_outputs: 0")
    model: Any = _load(tmp_path, content, Wish(num_outputs=0, asked=True))
    assert model.num_classes == 0


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_classifier_in_a_list_is_not_lost(tmp_path: Path, kind: type) -> None:
    content = {"backbone": BACKBONE, "classifier": kind([HEAD["weight"], HEAD["bias"]])}
    _refused(tmp_path, content, "classifier.0, classifier.1")


def test_networks_in_a_list_are_told_apart(tmp_path: Path) -> None:
    others = {name: tensor + 1 for name, tensor in TENSORS.items()}
    _refused(tmp_path, {"models": [TENSORS, others]}, "weights_key: models.0 or models.1")
    model = _load(tmp_path, {"models": [TENSORS, others]}, Wish(key="models.1"))
    assert torch.equal(model.state_dict()["norm.bias"], others["norm.bias"])


@pytest.mark.parametrize("name", ["temperature", "logit_scale", "head_scale.scale"])
def test_a_learned_scale_beside_the_network_is_refused(tmp_path: Path, name: str) -> None:
    _refused(tmp_path, {**_below("model", TENSORS), name: torch.tensor(2.0)}, f"unexpected {name}")


def test_what_is_of_training_alone_is_left_out(tmp_path: Path) -> None:
    content = {
        "model": TENSORS,
        "random_state": torch.get_rng_state(),
        "rng_states": [torch.get_rng_state()],
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(5, 24)}}, "param_groups": [{"lr": torch.tensor(0.1)}]},
        "lr_history": [torch.tensor(0.1)],
        "epoch": torch.tensor(3),
    }
    model = _load(tmp_path, content)
    assert torch.equal(model.state_dict()["head.weight"], HEAD["weight"])


def test_an_equal_copy_at_another_depth_is_no_second_source(tmp_path: Path) -> None:
    content = {"state_dict": TENSORS, "callbacks": {"average": dict(TENSORS)}}
    assert torch.equal(_load(tmp_path, content).state_dict()["head.weight"], HEAD["weight"])
    other = {**TENSORS, "head.weight": HEAD["weight"] + 1}
    _refused(tmp_path, {"state_dict": TENSORS, "callbacks": {"average": other}}, "callbacks.average.head.weight")


def test_register_tokens_are_named_in_settings(tmp_path: Path) -> None:
    _refused(tmp_path, _model(5, reg_tokens=4).state_dict(), r"model_kwargs: \{reg_tokens: 4\}")
