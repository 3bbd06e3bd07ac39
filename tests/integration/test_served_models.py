"""Several models in one server, from a YAML file and small checkpoints: every kind of task, what each can't serve, and
how it is computed."""

from __future__ import annotations

import io
import json
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import timm
import torch
from google.rpc import error_details_pb2
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from calls import Stub, array, contrast, method, output, refused, request, vector, violated
from cdam.v1 import method_pb2, model_pb2, target_pb2
from cdam_engine.preprocess import DataConfig, normalise, prepare
from in_this_process import served

SMALL = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
BIOMARKERS = ["diameter", "volume", "density", "spiculation", "lobulation", "margin", "sphericity", "calcification"]


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
        {
            "name": "attention pool",
            "architecture": "vit_base_patch16_siglip_224",
            "random_weights": True,
            "num_outputs": 4,
            "model_kwargs": SMALL,
        },
    ]
    (folder / "models.yaml").write_text(json.dumps({"models": models}))  # JSON is YAML
    with (
        served(models_file=folder / "models.yaml", log_level="error") as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield Stub(channel)


@pytest.fixture(scope="module")
def picture() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def _serving(folder: Path, **settings: Any) -> Iterator[Stub]:
    """A server of one small model of five outputs."""
    model = {"name": "small", "architecture": "vit_tiny_patch16_224", "random_weights": True, "num_outputs": 5}
    (folder / "models.yaml").write_text(json.dumps({"models": [{**model, "model_kwargs": SMALL}]}))
    settings["models_file"] = folder / "models.yaml"
    with served(**settings) as address, grpc.insecure_channel(address) as channel:
        yield Stub(channel)


def _unmet(call: Callable[[], object]) -> tuple[str, dict[str, str]]:
    """The reason and the metadata of a failed precondition."""
    code, _, (info,) = refused(call, error_details_pb2.ErrorInfo)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    return info.reason, dict(info.metadata)


def test_binary_with_one_logit(stub: Stub, picture: bytes) -> None:
    (target,) = stub.Explain(
        request(picture, output("malignant"), model="")
    ).targets  # the first of the file is the default
    assert target.probability == pytest.approx(1 / (1 + np.exp(-target.value)))


def test_regression_with_named_outputs(stub: Stub, picture: bytes) -> None:
    (target,) = stub.Explain(request(picture, output("spiculation"), model="biomarkers")).targets
    assert target.output_index == BIOMARKERS.index("spiculation")
    assert not target.HasField("probability")


def test_multi_label_with_a_head_of_ones_own(stub: Stub, picture: bytes) -> None:
    (target,) = stub.Explain(request(picture, output("sun"), model="labels")).targets
    assert target.probability == pytest.approx(1 / (1 + np.exp(-target.value)))
    assert violated(partial(stub.Explain, request(picture, output("sea"), model="labels"))) == "targets[0].output.name"
    assert stub.Explain(request(picture, output(2), model="labels")).targets[0].label == "sea"


def test_a_model_says_what_it_was_built_with(stub: Stub) -> None:
    described = stub.GetModel(model_pb2.GetModelRequest(name="biomarkers")).model
    assert dict(described.model_kwargs) == SMALL


def test_what_cannot_be_explained_says_why(stub: Stub, picture: bytes) -> None:
    asked = partial(stub.Explain, request(picture, output(0), model="convolutions"))
    assert _unmet(asked) == ("UNKNOWN_ARCHITECTURE", {"model": "convolutions"})
    described = stub.GetModel(model_pb2.GetModelRequest(name="convolutions")).model
    assert not any(support.supported for support in described.methods)
    assert "no Vision Transformer" in described.methods[0].reason


@pytest.mark.parametrize(
    "target", [output(0), output("tench"), target_pb2.Target(top_k=target_pb2.TopKTarget(k=1)), contrast(0, 1)]
)
def test_a_model_without_head_has_no_outputs(stub: Stub, picture: bytes, target: target_pb2.Target) -> None:
    asked = partial(stub.Explain, request(picture, vector(np.ones(48)), target, model="headless"))
    assert _unmet(asked) == ("NO_OUTPUTS", {"model": "headless"})


def test_a_model_without_head_serves_concepts_and_attention(stub: Stub, picture: bytes) -> None:
    concept, other = vector(np.ones(48)), vector(np.arange(48.0), target_pb2.SIMILARITY_L2)
    methods = [method(kind) for kind in ("cdam", "attention", "relevance_propagation", "patch_mask_prediction")]
    answer = stub.Explain(request(picture, concept, contrast(concept, other), model="headless", methods=methods))
    assert [target.label for target in answer.targets] == ["concept (dot)", "concept (dot) - concept (l2)"]
    assert len(answer.maps) == 7
    assert len(stub.Explain(request(picture, model="headless", methods=[method("attention")])).maps) == 1


def test_methods_that_a_model_cannot_serve_say_why(stub: Stub, picture: bytes) -> None:
    described = stub.GetModel(model_pb2.GetModelRequest(name="attention pool")).model
    support = {method_pb2.MethodKind.Name(item.method): item for item in described.methods}
    assert len(support) == 12
    assert support["METHOD_KIND_CDAM"].supported
    assert not support["METHOD_KIND_CDAM"].reason
    for kind in ("attention", "attention_rollout", "relevance_propagation", "partial_lrp", "patch_mask_prediction"):
        item = support[f"METHOD_KIND_{kind.upper()}"]
        assert not item.supported
        asked = request(picture, output(0), model="attention pool", methods=[method("cdam"), method(kind)])
        code, message, (info,) = refused(partial(stub.Explain, asked), error_details_pb2.ErrorInfo)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert message == f"methods[1].{kind}: model 'attention pool' can't serve it: {item.reason}"
        assert dict(info.metadata) == {"model": "attention pool", "method": kind}
        assert info.reason.isupper()
    can = [method(kind) for kind in ("smooth_cdam", "integrated_cdam", "input_x_gradient", "token_ablation")]
    assert len(stub.Explain(request(picture, output(0), model="attention pool", methods=can)).maps) == 4


@pytest.mark.parametrize("model", ["malignancy", "biomarkers", "labels", "attention pool"])
def test_patch_mask_prediction_speaks_in_the_models_task(stub: Stub, picture: bytes, model: str) -> None:
    asked = request(picture, output(0), model=model, methods=[method("patch_mask_prediction")])
    if model == "attention pool":
        assert _unmet(partial(stub.Explain, asked))[0] == "ATTENTION_POOL"
        return
    answer = stub.Explain(asked)
    scores = array(answer.maps[0].scores)
    assert not answer.maps[0].HasField("prefix_share")
    if model != "biomarkers":
        assert 0 < scores.min() <= scores.max() < 1
        return
    vit = _vit(8)
    config = DataConfig.from_timm(vit)
    with torch.no_grad(), Image.open(io.BytesIO(picture)) as image:
        pixels = torch.from_numpy(prepare(image, config).pixels)[None]
        tokens = vit.forward_features(normalise(pixels, config, torch.float32))
        values = vit.head(tokens[0, 1:, :])[:, 0].reshape(2, 2).numpy()
    np.testing.assert_allclose(scores, values, atol=1e-5)


def test_concepts_are_as_long_as_the_models_latent(stub: Stub, picture: bytes) -> None:
    asked = request(picture, output(0), vector(np.ones(47)), model="labels")
    assert violated(partial(stub.Explain, asked)) == "targets[1].concept.vector"


def test_contrasts_are_looked_up_on_both_sides(stub: Stub, picture: bytes) -> None:
    answer = stub.Explain(request(picture, contrast("volume", 2), model="biomarkers"))
    assert answer.targets[0].label == "volume - density"
    asked = request(picture, contrast("volume", "sea"), model="biomarkers")
    code, message, (info,) = refused(partial(stub.Explain, asked), error_details_pb2.ResourceInfo)
    assert (code, info.resource_name) == (grpc.StatusCode.NOT_FOUND, "sea")
    assert message.startswith("targets[0].contrast.negative.output.name")
    asked = request(picture, contrast("sea", "sun"), model="labels")
    assert violated(partial(stub.Explain, asked)) == "targets[0].contrast.positive.output.name"
    asked = request(picture, contrast(7, 8), model="biomarkers")
    assert refused(partial(stub.Explain, asked))[1].startswith("targets[0].contrast.negative.output.index")


def test_a_trunk_in_bfloat16(tmp_path: Path, picture: bytes) -> None:
    with _serving(tmp_path) as stub:
        exact = stub.Explain(request(picture, output(3)))
    with _serving(tmp_path, precision="bf16") as stub:
        assert stub.GetModel(model_pb2.GetModelRequest()).model.precision == model_pb2.PRECISION_BF16
        rounded = stub.Explain(request(picture, output(3)))
    found, truth = array(rounded.maps[0].scores), array(exact.maps[0].scores)
    assert not np.array_equal(found, truth)
    np.testing.assert_allclose(found, truth, atol=0.05 * np.abs(truth).max())


COMPILES = shutil.which("g++") is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.mark.skipif(not COMPILES, reason="compiling for a CPU needs a C++ compiler and Python's headers")
def test_a_compiled_trunk(tmp_path: Path, picture: bytes) -> None:
    with _serving(tmp_path) as stub:
        plain = stub.Explain(request(picture, output(3)))
    with _serving(tmp_path, compile=True, max_batch_size=3, token_cache_mib=0) as stub:
        futures = [stub.Explain.future(request(picture, output(3))) for _ in range(6)]
        answers = [future.result() for future in futures]
    for answer in answers:
        np.testing.assert_allclose(array(answer.maps[0].scores), array(plain.maps[0].scores), rtol=1e-3, atol=1e-6)


def test_without_a_token_cache_nothing_is_kept(tmp_path: Path, picture: bytes) -> None:
    with _serving(tmp_path, token_cache_mib=0) as stub:
        assert not any(stub.Explain(request(picture, output(0))).token_cache_hit for _ in range(2))


def test_all_are_listed_default_first_in_pages(stub: Stub) -> None:
    names, token = [], ""
    while not names or token:
        page = stub.ListModels(model_pb2.ListModelsRequest(page_size=2, page_token=token))
        names += [model.name for model in page.models]
        token = page.next_page_token
    assert names == ["malignancy", "attention pool", "biomarkers", "convolutions", "headless", "labels"]
