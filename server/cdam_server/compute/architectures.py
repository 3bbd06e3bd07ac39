"""Architectures of timm's that can't be explained, known by name before any weights are fetched or read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import timm
import timm.models

from cdam_server.settings.load_error import LoadError
from cdam_server.settings.specs import DEMO, FOLDER, ModelSpec

_CONVOLUTIONS: Final = "it is a convolutional network and has no attention that reads the tokens of image patches"
_HIERARCHICAL: Final = (
    "it is hierarchical: it attends within windows or merges patches on the way, so its last attention does not read the "
    "tokens of one patch grid"
)
_MIXERS: Final = "it mixes patches by other means than attention"

# timm's modules by what their networks are. A module of none of them is left to the explainer to judge.
_MODULES: Final = {
    _CONVOLUTIONS: (
        "byoanet byobnet convmixer convnext cspnet cspnext csatv2 densenet dla dpn edgenext efficientnet fasternet ghostnet "
        "hardcorenas hgnet hrnet inception_next inception_resnet_v2 inception_v3 inception_v4 lcnetv2 mambaout "
        "mobilenetv3 mobilenetv5 nasnet nfnet pnasnet rdnet regnet repghost repvit res2net resnest resnet resnetv2 "
        "rexnet selecsls senet shvit sknet starnet tresnet vgg vovnet xception xception_aligned"
    ),
    _HIERARCHICAL: (
        "coat davit efficientformer efficientformer_v2 efficientvit_mit efficientvit_msra fastvit focalnet gcvit hiera "
        "hieradet_sam2 iformer levit lowformer maxxvit metaformer mobilevit mvitv2 nest nextvit pit pvt_v2 swiftformer "
        "swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit twins visformer"
    ),
    _MIXERS: "efficientvim mlp_mixer sequencer",
}
_REASONS: Final = {module: reason for reason, modules in _MODULES.items() for module in modules.split()}


def why_not(architecture: str) -> str:
    """Why an architecture can't be explained; "" if nothing speaks against it so far."""
    if architecture.startswith(FOLDER):
        architecture = _in_folder(Path(architecture.removeprefix(FOLDER)))
    if architecture == DEMO or not timm.is_model(architecture):
        return ""
    module = timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2]
    return _REASONS.get(module, "")


def _in_folder(folder: Path) -> str:
    """The architecture that a folder of timm's names; "" if it is another library's, or can't be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("architecture", "")) if isinstance(config, dict) else ""


def check_explainable(specs: Sequence[ModelSpec]) -> dict[str, str]:
    """Look at the architectures of all models before the first one is built.

    Returns:
        Why a model can't be explained, by its name.

    Raises:
        LoadError: No model can be; the message has each one's reason.
    """
    reasons = {spec.name: reason for spec in specs if (reason := why_not(spec.architecture))}
    if len(reasons) == len(specs):
        named = {spec.name: "" if spec.name == spec.architecture else f"{spec.architecture}: " for spec in specs}
        raise none_explainable({name: f"{named[name]}{reason}" for name, reason in reasons.items()})
    return reasons


def none_explainable(reasons: dict[str, str]) -> LoadError:
    """The error of a server that could explain nothing."""
    each = "; ".join(f"{name!r} ({reason})" for name, reason in reasons.items())
    return LoadError("architecture", f"no model can be explained, so there is nothing to serve: {each}")
