"""Several models in one server, from a YAML file and small checkpoints: every kind of task, and one that CDAM can't explain."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import timm
import torch
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2_grpc, model_pb2, target_pb2
from cdam_server.bootstrap import serve_in_background
from cdam_server.config import Settings

SMALL = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
BIOMARKERS = ["diameter", "volume", "density", "spiculation", "lobulation", "margin", "sphericity", "calcification"]
Stub = explainer_service_pb2_grpc.ExplainerServiceStub


def _vit(outputs: int) -> nn.Module:
    torch.manual_seed(outputs)
    return timm.create_model("vit_tiny_patch16_224", num_classes=outputs, **SMALL).eval()


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stub]:
    folder = tmp_path_factory.mktemp("models")
    common = {"architecture": "vit_tiny_patch16_224", "model_kwargs": SMALL}
    save_file(_vit(1).state_dict(), folder / "malignancy.safetensors")
    torch.save(_vit(8).state_dict(), folder / "biomarkers.pth")
    (folder / "biomarkers.txt").write_text("\n".join(BIOMARKERS))
    save_file(_vit(0).state_dict(), folder / "backbone.safetensors")
    torch.manual_seed(9)
    save_file({"weight": torch.randn(3, 48), "bias": torch.randn(3)}, folder / "head.safetensors")
    models = [
        {
            "name": "malignancy",
            "checkpoint": "malignancy.safetensors",
            "task": "binary",
            "outputs": ["malignant"],
            **common,
        },
        {
            "name": "biomarkers",
            "checkpoint": "biomarkers.pth",
            "task": "regression",
            "outputs": "biomarkers.txt",
            **common,
        },
        {
            "name": "labels",
            "checkpoint": "backbone.safetensors",
            "head": "head.safetensors",
            "task": "multi_label",
            "outputs": ["sun", "sea", "sea"],
            **common,
        },
        {"name": "headless", "checkpoint": "backbone.safetensors", **common},
        {"name": "convolutions", "architecture": "test_resnet", "random_weights": True},
    ]
    (folder / "models.yaml").write_text(json.dumps({"models": models}))  # JSON is YAML
    settings = Settings.load(
        address="127.0.0.1:0", admin_address="127.0.0.1:0", models_file=folder / "models.yaml", log_level="error"
    )
    with serve_in_background(settings) as address, grpc.insecure_channel(address) as channel:
        yield Stub(channel)


def _explain(stub: Stub, model: str, **selector: object) -> explain_pb2.ExplainResponse:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    target = target_pb2.Target(output=target_pb2.OutputTarget(**selector))
    image = common_pb2.Image(encoded=buffer.getvalue())
    return stub.Explain(explain_pb2.ExplainRequest(model=model, image=image, targets=[target]), timeout=60)


def _refused(stub: Stub, model: str, **selector: object) -> tuple[grpc.StatusCode, str]:
    """Code, and the reason or field that the details name."""
    with pytest.raises(grpc.RpcError) as refused:
        _explain(stub, model, **selector)
    status = status_pb2.Status.FromString(dict(refused.value.trailing_metadata())["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    if status.details[0].Unpack(info):
        return refused.value.code(), info.reason
    assert status.details[0].Unpack(bad)
    return refused.value.code(), bad.field_violations[0].field


def test_binary_with_one_logit(stub: Stub) -> None:
    (target,) = _explain(stub, "", name="malignant").targets  # the first of the file is the default
    assert target.probability == pytest.approx(1 / (1 + np.exp(-target.value)))


def test_regression_with_named_outputs(stub: Stub) -> None:
    (target,) = _explain(stub, "biomarkers", name="spiculation").targets
    assert target.output_index == BIOMARKERS.index("spiculation")
    assert not target.HasField("probability")


def test_multi_label_with_a_head_of_ones_own(stub: Stub) -> None:
    (target,) = _explain(stub, "labels", name="sun").targets
    assert target.probability == pytest.approx(1 / (1 + np.exp(-target.value)))
    assert _refused(stub, "labels", name="sea") == (grpc.StatusCode.INVALID_ARGUMENT, "targets[0].output.name")
    assert _explain(stub, "labels", index=2).targets[0].label == "sea"


def test_what_cannot_be_explained_says_why(stub: Stub) -> None:
    assert _refused(stub, "headless", index=0) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_OUTPUTS")
    assert _refused(stub, "convolutions", index=0) == (grpc.StatusCode.FAILED_PRECONDITION, "UNKNOWN_ARCHITECTURE")
    described = stub.GetModel(model_pb2.GetModelRequest(name="convolutions")).model
    assert not any(method.supported for method in described.methods)
    assert "Vision Transformers" in described.methods[0].reason


def test_all_are_listed_default_first_in_pages(stub: Stub) -> None:
    names, token = [], ""
    while not names or token:
        page = stub.ListModels(model_pb2.ListModelsRequest(page_size=2, page_token=token))
        names += [model.name for model in page.models]
        token = page.next_page_token
    assert names == ["malignancy", "biomarkers", "convolutions", "headless", "labels"]
