"""Checkpoints as people have them: the right network, or a refusal that names what was found."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cdam_server.compute.loading import LoadError, ModelSpec, load_model
from cdam_server.compute.models import ServedModel
from small_models import ARCHITECTURE, SHAPE, StateDict, body, difference, load, prefixed, refusal, vit

HEAD = ("head.weight", "head.bias")


# --- what stands before the names


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",  # ijepa#34, pytorch#3805
        "_orig_mod.",  # nanoGPT#325, pytorch#101107
        "_orig_mod.module.",  # pytorch-image-models#2003
        "module._orig_mod.",
        "model.",  # pytorch-lightning#17415
        "model._orig_mod.module.",  # pytorch-lightning#20233
        "backbone.",  # solo-learn#218
        "backbone.model.",
        "module.model._orig_mod.backbone.",
        "net.",
        "network.encoder.",
        "student.",
        "student.backbone.",
        "_forward_module.module.",
        "visual.trunk.",
        "image_encoder.",
        "any.name.that.nobody.listed.",
    ],
)
def test_prefixes_in_any_mixture(prefix: str, tmp_path: Path) -> None:
    model = vit()
    loaded = load({"epoch": 3, "state_dict": prefixed(model.state_dict(), prefix)}, tmp_path)
    assert difference(loaded, model) == 0
    assert loaded.weights.prefix == "state_dict." + prefix.replace("_orig_mod.", "").replace("_forward_module.", "")
    assert not loaded.weights.left_out


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_within_the_names(wrapper: str, tmp_path: Path) -> None:
    # pytorch#101107 where blocks are compiled one by one; the others are torch's own wrappers of blocks
    model = vit()
    wrapped = {name.replace("blocks.0.", f"blocks.0.{wrapper}."): t for name, t in model.state_dict().items()}
    assert difference(load(wrapped, tmp_path), model) == 0


def test_blocks_in_chunks(tmp_path: Path) -> None:
    """dinov2#235: trained in chunks, blocks are called blocks.CHUNK.INDEX, numbered through all chunks."""
    model = vit(0)
    chunked = {name.replace("blocks.1.", "blocks.1.1."): tensor for name, tensor in body(model).items()}
    chunked = {name.replace("blocks.0.", "blocks.0.0."): tensor for name, tensor in chunked.items()}
    loaded = load({"teacher": prefixed(chunked, "backbone.")}, tmp_path)
    assert difference(loaded, model) == 0


@pytest.mark.parametrize(
    "key",
    ["state_dict", "model", "net", "params", "student", "teacher", "ema", "weight", "target_encoder", "net_state"],
)
def test_containers_of_any_name(key: str, tmp_path: Path) -> None:
    # ijepa#50, pytorch-hair-segmentation#30 ("weight"), implicit-shape-reconstruction#2 ("net_state")
    model = vit()
    loaded = load({"epoch": 7, "best": 0.5, key: {"module": model.state_dict()}}, tmp_path)
    assert difference(loaded, model) == 0
    assert loaded.weights.prefix == f"{key}.module."


def test_empty_containers_are_fallen_through(tmp_path: Path) -> None:
    model = vit()
    loaded = load({"state_dict": {}, "model_ema": None, "teacher": {}, "model": model.state_dict()}, tmp_path)
    assert difference(loaded, model) == 0


def test_a_file_of_other_things_names_its_keys(tmp_path: Path) -> None:
    said = refusal({"epoch": 7, "lr": 0.1, "history": [1, 2]}, tmp_path)
    assert "there are no weights" in said
    assert "epoch, lr, history" in said


def test_an_optimisers_state_is_no_network(tmp_path: Path) -> None:
    model = vit()
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimiser.step()
    assert "optimizer" in refusal({"optimizer": optimiser.state_dict(), "epoch": 1}, tmp_path)
    both = {"optimizer": optimiser.state_dict(), "model": model.state_dict()}
    assert difference(load(both, tmp_path), model) == 0


# --- two sources for one tensor


def test_two_networks_in_one_file_are_never_chosen_from(tmp_path: Path) -> None:
    """vissl#545 (MoCo v3's base and momentum encoders), dino#44 (student or teacher?)."""
    base, momentum = vit(0), vit(0, seed=2)
    weights = {
        **prefixed(body(base), "module.base_encoder."),
        **prefixed(body(momentum), "module.momentum_encoder."),
    }
    said = refusal({"state_dict": weights}, tmp_path)
    assert "two sources" in said
    assert "state_dict.module.base_encoder.cls_token" in said
    assert "state_dict.module.momentum_encoder.cls_token" in said
    assert "weights_key" in said
    for key, model in (("base_encoder", base), ("momentum_encoder", momentum)):
        loaded = load({"state_dict": weights}, tmp_path, weights_key=key)
        assert difference(loaded, model) == 0
        assert len(loaded.weights.left_out) == len(body(base))


@pytest.mark.parametrize("nested", [True, False])
def test_student_and_teacher(nested: bool, tmp_path: Path) -> None:
    """dino#44, dinov2#85: which of the two is it?"""
    networks = {"student": vit(0), "teacher": vit(0, seed=2)}
    content: dict[str, Any] = {name: prefixed(body(model), "backbone.") for name, model in networks.items()}
    if not nested:
        content = {f"{name}.{key}": t for name, weights in content.items() for key, t in weights.items()}
    said = refusal(content, tmp_path)
    assert "student.backbone." in said
    assert "teacher.backbone." in said
    assert difference(load(content, tmp_path, weights_key="teacher"), networks["teacher"]) == 0
    assert difference(load(content, tmp_path, weights_key="student.backbone"), networks["student"]) == 0


def test_model_and_ema_in_one_state_dict(tmp_path: Path) -> None:
    """MeanFlow#12: `model` or `ema`? Nobody would see it in a map."""
    model, ema = vit(), vit(seed=2)
    weights = {**prefixed(model.state_dict(), "model."), **prefixed(ema.state_dict(), "ema.")}
    assert "model.cls_token" in refusal(weights, tmp_path)
    loaded = load(weights, tmp_path, weights_key="ema")
    assert difference(loaded, ema) == 0
    assert "model.head.weight" in loaded.weights.left_out


def test_averages_without_dots_in_their_names(tmp_path: Path) -> None:
    """Latent-diffusion's LitEma keeps `model_ema.blocks0norm1weight` beside `model.blocks.0.norm1.weight`."""
    model, ema = vit(0), vit(0, seed=2)
    shadow = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in body(ema).items()}
    counters = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}
    weights = {**prefixed(body(model), "model."), **shadow, **counters}
    assert "two sources" in refusal(weights, tmp_path)
    assert difference(load(weights, tmp_path, weights_key="model_ema"), ema) == 0
    assert difference(load(weights, tmp_path, weights_key="model"), model) == 0


def test_equal_copies_are_one_source(tmp_path: Path) -> None:
    model = vit()
    loaded = load({"encoder": model.state_dict(), "target_encoder": model.state_dict()}, tmp_path)
    assert difference(loaded, model) == 0


@pytest.mark.parametrize(("average", "plain"), [("state_dict_ema", "state_dict"), ("model_ema", "model")])
def test_timms_averages_go_first_and_it_is_told(average: str, plain: str, tmp_path: Path) -> None:
    model, ema = vit(), vit(seed=2)
    loaded = load({plain: model.state_dict(), average: ema.state_dict()}, tmp_path)
    assert difference(loaded, ema) == 0
    assert loaded.weights.prefix == f"{average}."
    assert f"{plain}.head.weight" in loaded.weights.left_out
    assert (
        difference(load({plain: model.state_dict(), average: ema.state_dict()}, tmp_path, weights_key=plain), model)
        == 0
    )


def test_swa_counters_are_no_weights(tmp_path: Path) -> None:
    """pytorch#71763, pytorch-lightning#9938: AveragedModel has module.* and n_averaged."""
    model = vit()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    loaded = load(averaged.state_dict(), tmp_path)
    assert difference(loaded, model) == 0
    assert loaded.weights.left_out == ("n_averaged",)


def test_names_that_fall_together(tmp_path: Path) -> None:
    model = vit()
    weights = prefixed(model.state_dict(), "module.") | {"head.weight": torch.zeros(3, 32)}
    said = refusal(weights, tmp_path)
    assert "module.head" in said
    assert "head and module.head" in said


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    said = refusal({"model": vit().state_dict()}, tmp_path, weights_key="teacher")
    assert "teacher" in said
    assert "it has model" in said


def test_a_key_goes_with_a_checkpoint_alone() -> None:
    with pytest.raises(ValueError, match="weights_key"):
        ModelSpec(name="m", architecture=ARCHITECTURE, random_weights=True, weights_key="model")


# --- classifiers


@pytest.mark.parametrize(
    "name",
    ["fc", "classifier", "linear", "head", "head.fc", "heads.head", "mlp_head.0", "cls_head", "classification_head"],
)
@pytest.mark.parametrize("where", ["", "module.", "state_dict"])
def test_a_classifier_beside_the_backbone(name: str, where: str, tmp_path: Path) -> None:
    """dino#201 (a classifier that is silently not used), pytorch-image-models#2332, CloserLookFewShot#36."""
    model = vit()
    weights = prefixed(body(model), "backbone.")
    weights |= {f"{name}.weight": model.state_dict()[HEAD[0]], f"{name}.bias": model.state_dict()[HEAD[1]]}
    content: object = {where: weights} if where == "state_dict" else prefixed(weights, where)
    loaded = load(content, tmp_path, outputs=["a", "b", "c"])
    assert loaded.output_count == 3
    assert difference(loaded, model) == 0


def test_a_classifier_in_a_container_of_its_own(tmp_path: Path) -> None:
    model = vit()
    head = {"weight": model.state_dict()[HEAD[0]], "bias": model.state_dict()[HEAD[1]]}
    assert difference(load({"backbone": body(model), "classifier": head}, tmp_path), model) == 0


def test_a_classifier_without_bias(tmp_path: Path) -> None:
    model = vit()
    nn.init.zeros_(model.head.bias)  # type: ignore[union-attr,arg-type]
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "head.bias"}
    assert difference(load(weights, tmp_path), model) == 0


@pytest.mark.parametrize(
    "layers",
    [
        nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 3)),
        nn.Sequential(nn.Dropout(), nn.Linear(32, 3)),
        nn.Sequential(nn.BatchNorm1d(32, affine=False), nn.Linear(32, 3)),  # MAE's linear probe, mmselfsup#183
        nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 3)),
    ],
)
@pytest.mark.parametrize("name", ["head", "classifier"])
def test_heads_whose_layers_no_file_tells(layers: nn.Module, name: str, tmp_path: Path) -> None:
    weights = body(vit()) | prefixed(layers.state_dict(), f"{name}.")
    for more in ({}, {"outputs": ["a", "b", "c"]}):
        said = refusal(weights, tmp_path, **more)
        assert f"{name}.1.weight" in said or f"{name}.0.weight" in said
        assert "num_outputs: 0" in said
    assert load(weights, tmp_path, num_outputs=0).output_count == 0


def test_two_classifiers(tmp_path: Path) -> None:
    weights = vit().state_dict() | {"fc.weight": torch.zeros(5, 32), "fc.bias": torch.zeros(5)}
    said = refusal(weights, tmp_path)
    assert "fc and head" in said


def test_a_classifier_for_another_latent(tmp_path: Path) -> None:
    """DINO's linear probe reads the last four blocks at once (dino#201)."""
    weights = body(vit()) | {"linear.weight": torch.zeros(3, 128), "linear.bias": torch.zeros(3)}
    said = refusal(weights, tmp_path)
    assert "linear.weight" in said
    assert "128" in said


def test_a_classifier_of_no_known_name(tmp_path: Path) -> None:
    weights = prefixed(body(vit()), "backbone.") | {"benign_or_not.weight": torch.zeros(3, 32)}
    assert "unexpected benign_or_not.weight" in refusal(weights, tmp_path)


def test_heads_of_self_supervision(tmp_path: Path) -> None:
    """dino#66: head.mlp and head.last_layer beside the backbone, which nobody asks for its outputs."""
    model = vit(0)
    head = {"mlp.0.weight": torch.ones(4, 32), "mlp.0.bias": torch.ones(4), "last_layer.weight_g": torch.ones(4, 1)}
    weights = prefixed(body(model), "backbone.") | prefixed(head, "head.")
    loaded = load({"teacher": weights}, tmp_path)
    assert (loaded.output_count, difference(loaded, model)) == (0, 0)
    assert "teacher.head.last_layer.weight_g" in loaded.weights.left_out
    said = refusal({"teacher": weights}, tmp_path, outputs=["a", "b"])
    assert "teacher.head" in said
    assert "self-supervised" in said


def test_dinov2s_training_checkpoints(tmp_path: Path) -> None:
    """dinov2#235: teacher.backbone with dino_head and ibot_head in one dict with the student's."""
    student, teacher = vit(0), vit(0, seed=2)
    weights: StateDict = {}
    for name, model in (("student", student), ("teacher", teacher)):
        weights |= prefixed(body(model), f"{name}.backbone.")
        weights |= {
            f"{name}.dino_head.mlp.0.weight": torch.ones(4, 32),
            f"{name}.ibot_head.mlp.0.weight": torch.ones(4, 32),
        }
    content = {"model": weights, "iteration": 7}
    assert "two sources" in refusal(content, tmp_path)
    loaded = load(content, tmp_path, weights_key="teacher")
    assert (loaded.output_count, difference(loaded, teacher)) == (0, 0)


def test_decoders_of_masked_autoencoders(tmp_path: Path) -> None:
    """RETFound#34, dmae#3: mask_token and decoder_* beside the encoder."""
    model = vit(0)
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 5, 16),
        "decoder_embed.weight": torch.zeros(16, 32),
        "decoder_blocks.0.norm1.weight": torch.zeros(16),
        "decoder_pred.weight": torch.zeros(768, 16),
    }
    loaded = load({"model": body(model) | decoder}, tmp_path)
    assert (loaded.output_count, difference(loaded, model)) == (0, 0)
    assert "model.decoder_pred.weight" in loaded.weights.left_out


def test_fine_tuned_masked_autoencoders_say_which_pooling(tmp_path: Path) -> None:
    """RETFound#34, mae#6: fine-tuned with global pooling, fc_norm in place of norm."""
    model = vit(global_pool="avg")
    assert "fc_norm.weight" in model.state_dict()
    assert "model_kwargs: {global_pool: avg}" in refusal({"model": model.state_dict()}, tmp_path)
    assert difference(load({"model": model.state_dict()}, tmp_path, model_kwargs={"global_pool": "avg"}), model) == 0


# --- what training leaves beside the weights


@pytest.mark.parametrize(
    "name",
    ["criterion.pos_weight", "criterion.criteria.0.weight", "loss_fct.weight", "module.criterion.nll_loss.weight"],
)
def test_weights_of_losses(name: str, tmp_path: Path) -> None:
    """pytorch-lightning#2617, superpoint_transformer#12, FARM#428."""
    model = vit()
    weights = prefixed(model.state_dict(), "module.model.") | {name: torch.ones(3)}
    loaded = load({"state_dict": weights}, tmp_path)
    assert difference(loaded, model) == 0
    assert loaded.weights.left_out == (f"state_dict.{name}",)


def test_a_matrix_in_a_loss_may_be_the_classifier(tmp_path: Path) -> None:
    """open-metric-learning#422: ArcFace keeps its classes in criterion.weight."""
    weights = prefixed(body(vit()), "model.") | {"criterion.weight": torch.zeros(3, 32)}
    assert "criterion.weight" in refusal(weights, tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        {"best": np.float64(0.5)},  # MRSegmentator#19, deepmd-kit#4147
        {"best": np.float32(0.5), "step": np.int64(3)},
        {"args": argparse.Namespace(lr=0.1, out=Path("runs"))},
    ],
)
def test_what_can_do_no_harm_is_read(extra: dict[str, Any], tmp_path: Path) -> None:
    model = vit()
    assert difference(load({"model": model.state_dict(), **extra}, tmp_path), model) == 0


# --- files of other kinds


def test_torchscript(tmp_path: Path) -> None:
    """BackgroundMattingV2#65: a TorchScript archive is taken for a checkpoint, and the other way round."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "m.pt"))
    with pytest.raises(LoadError, match=r"TorchScript .* torch.jit.load"):
        load_model(ModelSpec(name="m", architecture=ARCHITECTURE, checkpoint=tmp_path / "m.pt"))


def test_adapters(tmp_path: Path) -> None:
    adapter = {f"base_model.model.blocks.0.attn.qkv.lora_{part}.weight": torch.zeros(2, 32) for part in "AB"}
    for weights in (adapter, adapter | vit().state_dict()):
        assert "merge_and_unload" in refusal(weights, tmp_path)


@pytest.mark.parametrize(
    "quantised",
    [
        {"blocks.0.mlp.fc1.weight": torch.zeros(128, 32, dtype=torch.int8), "blocks.0.mlp.fc1.SCB": torch.zeros(128)},
        {"blocks.0.mlp.fc1.zero_point": torch.tensor(0), "blocks.0.mlp.fc1.scale": torch.tensor(1.0)},
        {"blocks.0.mlp.fc1.weight_scale": torch.zeros(128)},
    ],
)
def test_quantised_weights(quantised: StateDict, tmp_path: Path) -> None:
    said = refusal(vit().state_dict() | quantised, tmp_path)
    assert "quantised" in said
    assert "blocks.0.mlp.fc1." in said


def test_shards_of_zero_stage_3(tmp_path: Path) -> None:
    """DeepSpeed#3574, pytorch-lightning#18648, axolotl#933: tensors of shape (0,)."""
    empty = {name: torch.zeros(0) for name in vit().state_dict()}
    assert "zero_to_fp32.py" in refusal({"module": empty, "ds_version": "0.14"}, tmp_path)
    said = refusal({"module": empty}, tmp_path)
    assert "empty" in said
    assert "ZeRO" in said


def test_deepspeeds_model_states_of_stages_1_and_2(tmp_path: Path) -> None:
    model = vit()
    content = {"module": model.state_dict(), "ds_config": {"zero_stage": 2}, "ds_version": "0.14"}
    assert difference(load(content, tmp_path), model) == 0


def test_optimiser_shards(tmp_path: Path) -> None:
    flat = {"optimizer_state_dict": {"zero_stage": 2, "single_partition_of_fp32_groups": [torch.zeros(9)]}}
    assert "zero_to_fp32.py" in refusal(flat, tmp_path)
    assert "FULL_STATE_DICT" in refusal({"_flat_param": torch.zeros(9)}, tmp_path)


@pytest.mark.parametrize(
    ("file", "word"),
    [(".metadata", "dcp_to_torch"), ("global_step5", "zero_to_fp32"), ("model.safetensors.index.json", "shards")],
)
def test_folders_of_shards(file: str, word: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(LoadError, match=word):
        load_model(ModelSpec(name="m", architecture=ARCHITECTURE, checkpoint=tmp_path))


def test_safetensors_with_metadata(tmp_path: Path) -> None:
    model = vit()
    save_file(prefixed(model.state_dict(), "model."), tmp_path / "w.safetensors", metadata={"format": "pt", "x": "y"})
    spec = ModelSpec(
        name="m",
        architecture=ARCHITECTURE,
        checkpoint=tmp_path / "w.safetensors",
        model_kwargs={"img_size": 32, **SHAPE},
    )
    assert difference(load_model(spec), model) == 0


def test_equal_backbones_with_other_classifiers(tmp_path: Path) -> None:
    """A frozen backbone is the same in a model and in its average; their heads are not."""
    model = vit()
    other = {name: 2 * tensor if name.startswith("head.") else tensor for name, tensor in model.state_dict().items()}
    weights = prefixed(model.state_dict(), "model.") | prefixed(other, "ema.")
    said = refusal(weights, tmp_path)
    assert "model.head.bias and ema.head.bias" in said
    assert difference(load(weights, tmp_path, weights_key="model"), model) == 0
    headless = prefixed(model.state_dict(), "model.") | prefixed(body(model), "ema.")
    assert "head" in refusal(headless, tmp_path)


def test_averages_in_a_callback(tmp_path: Path) -> None:
    """pytorch-lightning#10914: the average is kept in the callback's state, as ema_state_dict."""
    model, ema = vit(), vit(seed=2)
    content = {
        "state_dict": prefixed(model.state_dict(), "model."),
        "callbacks": {"EMA": {"ema_state_dict": prefixed(ema.state_dict(), "model.")}},
    }
    said = refusal(content, tmp_path)
    assert "callbacks.EMA.ema_state_dict.model.cls_token" in said
    assert difference(load(content, tmp_path, weights_key="ema_state_dict"), ema) == 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of sparse tensors
@pytest.mark.parametrize(
    ("name", "tensor", "word"),
    [
        ("norm.weight", torch.ones(32, dtype=torch.complex64), "complex64"),
        ("norm.weight", torch.ones(32, dtype=torch.int64), "int64"),
        ("head.weight", torch.ones(3, 32).to_sparse(), "sparse"),
        ("head.weight", torch.ones(3, 32, device="meta"), "meta"),
    ],
)
def test_tensors_that_are_no_weights(name: str, tensor: torch.Tensor, word: str, tmp_path: Path) -> None:
    said = refusal(vit().state_dict() | {name: tensor}, tmp_path)
    assert name in said
    assert word in said


def test_a_layer_that_timm_gave_up_is_not_dropped(tmp_path: Path) -> None:
    """Older ViTs have pre_logits, a layer before the classifier that timm's conversion leaves out."""
    weights = vit().state_dict() | {"pre_logits.fc.weight": torch.ones(32, 32), "pre_logits.fc.bias": torch.ones(32)}
    assert "pre_logits.fc.weight" in refusal(weights, tmp_path)


def test_queues_of_contrastive_training(tmp_path: Path) -> None:
    """vissl#573: MoCo keeps its queue beside the encoder."""
    model = vit(0)
    queue = {"queue": torch.ones(32, 10), "queue_ptr": torch.zeros(1)}
    loaded = load({"state_dict": prefixed(body(model), "encoder_q.") | queue}, tmp_path)
    assert difference(loaded, model) == 0
    assert set(loaded.weights.left_out) == {"state_dict.queue", "state_dict.queue_ptr"}


def test_another_network_beside_the_models(tmp_path: Path) -> None:
    content = {"generator": vit().state_dict(), "discriminator": {"conv.weight": torch.ones(3, 3)}}
    said = refusal(content, tmp_path)
    assert "unexpected discriminator.conv.weight" in said
    assert "weights_key: generator" in said
    assert difference(load(content, tmp_path, weights_key="generator"), vit()) == 0


# --- heads of several layers, spelled out


@pytest.mark.parametrize(
    ("layers", "spelled"),
    [
        (nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 3)), ["linear", "gelu", "linear"]),
        (nn.Sequential(nn.Dropout(), nn.Linear(32, 3)), ["dropout", "linear"]),
        (
            nn.Sequential(nn.BatchNorm1d(32, affine=False, eps=1e-6), nn.Linear(32, 3)),  # MAE's linear probe
            [{"batch_norm": 1e-6}, "linear"],
        ),
        (
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3, bias=False)),
            ["layer_norm", "linear", "tanh", "dropout", "linear"],
        ),
    ],
)
@pytest.mark.parametrize("apart", [True, False])
def test_heads_of_several_layers(layers: nn.Sequential, spelled: list[Any], apart: bool, tmp_path: Path) -> None:
    backbone = vit(0)
    with torch.no_grad():
        layers.train()(torch.randn(64, 32))  # so that running averages are some
    layers.eval()
    settings: dict[str, Any] = {"head_layers": spelled, "outputs": ["a", "b", "c"]}
    weights = prefixed(body(backbone), "backbone.")
    if apart:
        torch.save(prefixed(layers.state_dict(), "module.classifier."), tmp_path / "head.pth")
        settings["head"] = tmp_path / "head.pth"
    else:
        weights |= prefixed(layers.state_dict(), "classifier.")
    loaded = load(weights, tmp_path, **settings)
    assert loaded.output_count == 3
    assert difference(loaded, nn.Sequential(backbone, layers)) < 1e-6
    assert ServedModel(loaded).unsupported is None
    assert load(weights, tmp_path, **settings).fingerprint == loaded.fingerprint


def test_layers_that_are_not_the_heads(tmp_path: Path) -> None:
    weights = body(vit()) | prefixed(nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 3)).state_dict(), "head.")
    for wrong in (["linear"], ["linear", "linear"], ["dropout", "linear", "gelu", "linear"]):
        said = refusal(weights, tmp_path, head_layers=wrong)
        assert "head.0" not in said
        assert "0.weight (8, 32)" in said
    one = load(weights, tmp_path, head_layers=["linear", "gelu", "linear"])
    other = load(weights, tmp_path, head_layers=["linear", "relu", "linear"])
    assert one.fingerprint != other.fingerprint
    assert "there is none" in refusal(body(vit()), tmp_path, head_layers=["linear"])


@pytest.mark.parametrize(
    "layers", [[], "linear", ["linear", "softmax"], ["linear", "gelu"], [{"norm": 1e-6}, "linear"]]
)
def test_layers_that_make_no_sense(layers: Any) -> None:
    with pytest.raises(ValueError, match="head_layers"):
        ModelSpec(name="m", architecture=ARCHITECTURE, checkpoint=Path("w.pth"), head_layers=layers)


def test_segment_anythings_own_checkpoints(tmp_path: Path) -> None:
    """MedSAM#200, segment-anything-finetuner#2: image_encoder.*, with names of its own, beside prompts and masks."""
    architecture, kwargs = "samvit_base_patch16", {"window_size": 0, "global_attn_indexes": [0, 1]}
    model = vit(0, architecture=architecture, **kwargs)
    weights = {f"image_encoder.{name.replace('mlp.fc', 'mlp.lin')}": t for name, t in model.state_dict().items()}
    weights |= {
        "prompt_encoder.no_mask_embed.weight": torch.ones(1, 8),
        "mask_decoder.iou_token.weight": torch.ones(1, 8),
    }
    for prefix in ("", "module."):
        loaded = load(prefixed(weights, prefix), tmp_path, architecture=architecture, model_kwargs=kwargs)
        assert difference(loaded, model) == 0
        assert f"{prefix}mask_decoder.iou_token.weight" in loaded.weights.left_out
    larger = vit(0, architecture=architecture, img_size=64, **kwargs)
    said = refusal(larger.state_dict(), tmp_path, architecture=architecture, model_kwargs=kwargs)
    assert "for inputs of 64 x 64 pixels" in said or "4 x 4 for 64 x 64" in said


@pytest.mark.parametrize("name", ["metric_fc", "optimizer_head", "config_head"])
def test_a_matrix_is_never_taken_for_training(name: str, tmp_path: Path) -> None:
    """pytorch-metric-learning#544: the classes are in the loss, or in a module that is called metric_fc."""
    weights = prefixed(body(vit()), "model.") | {f"{name}.weight": torch.zeros(3, 32)}
    for content in (weights, {"state_dict": weights}):
        assert f"{name}.weight" in refusal(content, tmp_path)


def test_a_temperature_is_part_of_the_network(tmp_path: Path) -> None:
    """FARM#721: a calibrated model keeps its temperature beside the network; outputs are divided by it."""
    weights = prefixed(vit().state_dict(), "model.") | {"temperature": torch.tensor(1.5)}
    for content in (weights, {"state_dict": weights}):
        assert "temperature" in refusal(content, tmp_path)
    assert difference(load({"state_dict": vit().state_dict(), "loss": torch.tensor(0.5)}, tmp_path), vit()) == 0


def test_a_predictor_of_one_layer_is_a_classifier(tmp_path: Path) -> None:
    model = vit()
    weights = prefixed(body(model), "backbone.")
    weights |= {"predictor.weight": model.state_dict()[HEAD[0]], "predictor.bias": model.state_dict()[HEAD[1]]}
    assert difference(load(weights, tmp_path), model) == 0
    assert "may be a projection" in refusal(body(model) | {"projector.weight": torch.zeros(3, 32)}, tmp_path)
    unnormed = body(model) | {"head.last_layer.weight": torch.zeros(3, 32)}
    assert "head.last_layer.weight" in refusal(unnormed, tmp_path)
