"""Models of transformers, torchvision and open_clip behind a real `cdam serve`, from a picture to a map: equal to what their
own processors and modules give with a full backward pass."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
import torch
import transformers
from open_clip.model import CLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ViT_B_16_Weights
from torchvision.models.vision_transformer import VisionTransformer

from calls import Stub, array, output, request, vector
from cdam.v1 import model_pb2, target_pb2
from processes import ServerProcess, serving
from reference import foreign

transformers.utils.logging.disable_progress_bar()

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
MLP = {**SIZES, "intermediate_size": 100}
LABELS = {"id2label": {0: "tench", 1: "goldfish", 2: "crane", 3: "crane"}, "label2id": {}}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
VISION_CFG = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 48, "head_width": 16}
TEXT_CFG = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}


def _vit() -> nn.Module:
    return foreign.randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**MLP, **LABELS)))


def _dinov2() -> nn.Module:
    config = transformers.Dinov2Config(**{**SIZES, "image_size": 56}, **LABELS)
    return foreign.randomise(transformers.Dinov2ForImageClassification(config))


def _clip() -> nn.Module:
    config = transformers.CLIPConfig(vision_config=MLP, text_config=TEXT, projection_dim=24)
    return foreign.randomise(transformers.CLIPModel(config))


def _torchvision() -> nn.Module:
    return foreign.randomise(VisionTransformer(224, 16, 1, 12, 768, 96, num_classes=3))


def _open_clip() -> nn.Module:
    return foreign.randomise(CLIP(24, vision_cfg=VISION_CFG, text_cfg=TEXT_CFG, quick_gelu=True))


PROCESSORS = {
    "vit": transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}),
    "dinov2": transformers.BitImageProcessorPil(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}),
    "clip": transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
}
PREPROCESS_CFG = {"size": 32, "resize_mode": "squash", "interpolation": "bilinear", "mean": (0.5,) * 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("foreign")
    for name, model in (("vit", _vit()), ("dinov2", _dinov2()), ("clip", _clip())):
        model.save_pretrained(folder / name, max_shard_size="60KB" if name == "dinov2" else "5GB")
        PROCESSORS[name].save_pretrained(folder / name)
    torch.save({"model": _torchvision().state_dict(), "epoch": 3}, folder / "torchvision.pth")
    (folder / "open_clip").mkdir()
    torch.save(_open_clip().state_dict(), folder / "open_clip" / "open_clip_pytorch_model.bin")
    config = {"embed_dim": 24, "vision_cfg": VISION_CFG, "text_cfg": TEXT_CFG, "quick_gelu": True}
    (folder / "open_clip" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS_CFG})
    )
    models = [{"name": name, "architecture": f"local-dir:{name}"} for name in ("vit", "dinov2", "clip", "open_clip")]
    models.append(
        {
            "name": "torchvision",
            "architecture": "torchvision:vit_b_16.IMAGENET1K_V1",
            "checkpoint": "torchvision.pth",
            "outputs": ["one", "two", "three"],
        }
    )
    (folder / "models.yaml").write_text(json.dumps({"models": models}))  # JSON is YAML
    with serving(folder / "log", "--models-file", str(folder / "models.yaml")) as process:
        yield process


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> Iterator[Stub]:
    with grpc.insecure_channel(server.address) as channel:
        yield Stub(channel)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Of odd proportions, so that every step of the preprocessing matters."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
    return Image.fromarray(coarse).resize((349, 241), Image.Resampling.BICUBIC)


def _encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _processed(name: str, picture: Image.Image) -> Tensor:
    return torch.as_tensor(np.asarray(PROCESSORS[name](picture, return_tensors="pt").pixel_values)).float()


def _check(
    stub: Stub,
    model: str,
    picture: Image.Image,
    pixels: Tensor,
    module: nn.Module,
    norm1: nn.Module,
    forward: Callable[[Tensor], Tensor],
    target: target_pb2.Target,
    wanted: Tensor,
) -> str:
    """The map and the value equal theirs; returns the target's label."""
    expected = foreign.cdam(module, norm1, forward, pixels, wanted)
    answer = stub.Explain(request(_encoded(picture), target, model=model))
    scores = array(answer.maps[0].scores)
    truth = expected.scores[0, 1:].reshape(scores.shape).numpy()
    np.testing.assert_allclose(scores, truth, rtol=0, atol=2e-5 * np.abs(truth).max())
    value = float(expected.outputs[0] @ wanted)
    assert answer.targets[0].value == pytest.approx(value, rel=1e-4, abs=1e-5)
    return str(answer.targets[0].label)


def test_vit_of_transformers(stub: Stub, picture: Image.Image) -> None:
    module = _vit()
    norm1 = module.vit.layers[-1].layernorm_before
    label = _check(
        stub,
        "vit",
        picture,
        _processed("vit", picture),
        module,
        norm1,
        lambda pixels: module(pixels).logits,
        output("goldfish"),
        torch.eye(4)[1],
    )
    assert label == "goldfish"


def test_dinov2_of_transformers_in_shards_and_resampled(stub: Stub, picture: Image.Image) -> None:
    module = _dinov2()
    norm1 = module.dinov2.encoder.layer[-1].norm1
    label = _check(
        stub,
        "dinov2",
        picture,
        _processed("dinov2", picture),
        module,
        norm1,
        lambda pixels: module(pixels).logits,
        output(2),
        torch.eye(4)[2],
    )
    assert label == "crane"


def test_clip_of_transformers(stub: Stub, picture: Image.Image) -> None:
    module = _clip()
    concept = torch.randn(24, generator=torch.Generator().manual_seed(3))
    _check(
        stub,
        "clip",
        picture,
        _processed("clip", picture),
        module,
        module.vision_model.encoder.layers[-1].layer_norm1,
        lambda pixels: module.get_image_features(pixels).pooler_output,
        vector(concept.numpy(), target_pb2.SIMILARITY_DOT),
        concept,
    )


def test_torchvision(stub: Stub, picture: Image.Image) -> None:
    module = _torchvision()
    pixels = ViT_B_16_Weights.IMAGENET1K_V1.transforms()(picture)[None]
    norm1 = module.encoder.layers[-1].ln_1
    assert _check(
        stub, "torchvision", picture, pixels, module, norm1, module, output("three"), torch.eye(3)[2]
    ) == "three"  # fmt: skip


def test_open_clip(stub: Stub, picture: Image.Image) -> None:
    module = _open_clip()
    concept = torch.randn(24, generator=torch.Generator().manual_seed(4))
    pixels = image_transform_v2(PreprocessCfg(**PREPROCESS_CFG), is_train=False)(picture)[None]
    _check(
        stub,
        "open_clip",
        picture,
        pixels,
        module,
        module.visual.transformer.resblocks[-1].ln_1,
        module.encode_image,
        vector(concept.numpy(), target_pb2.SIMILARITY_DOT),
        concept,
    )


def test_what_the_files_say_is_what_get_model_says(stub: Stub, server: ServerProcess) -> None:
    vit = stub.GetModel(model_pb2.GetModelRequest(name="vit")).model
    assert list(vit.output_names) == ["tench", "goldfish", "crane", "crane"]
    assert vit.architecture == "transformers:ViTForImageClassification"
    assert (vit.input_size.height, vit.patch_grid.width, vit.prefix_tokens) == (32, 4, 1)
    clip = stub.GetModel(model_pb2.GetModelRequest(name="clip")).model
    assert (clip.output_count, clip.latent_size) == (0, 24)
    dinov2 = stub.GetModel(model_pb2.GetModelRequest(name="dinov2")).model
    assert (dinov2.output_count, dinov2.latent_size, dinov2.flexible_input_size) == (4, 96, False)
    events = {line["model"]: line for line in server.log_lines() if line["event"] == "converted"}
    assert events["clip"]["source"] == "transformers:CLIPModel"
    assert "left out: the text tower" in events["clip"]["notes"][0]
    resampled = [line for line in server.log_lines() if line["event"] == "resampled"]
    assert [(line["model"], line["what"]) for line in resampled] == [
        ("dinov2", "positions from those for 56 x 56 pixels to those for 32 x 32")
    ]
