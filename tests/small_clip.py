"""Small CLIP models with random weights, as open_clip saves them, and open_clip's own answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import cdam
import in_this_process
from cdam_server.operation import logs
from reference import foreign

TEXT = {"context_length": 10, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 48, "head_width": 16}
SIGLIP = {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"}
PREPROCESSING = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.3], "interpolation": "bicubic", "resize_mode": "squash"}
WORDS = "a photo picture of the cat dog one two three four five six seven eight nine"
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
    "siglip": {
        "embed_dim": 96,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": SIGLIP,
        "text_cfg": {
            **TEXT,
            "vocab_size": 64,
            "hf_tokenizer_name": "its own",
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    },
}


@dataclass(frozen=True)
class Folder:
    """A model as open_clip saves it, and the model itself."""

    path: Path
    model: Any

    @property
    def norm1(self) -> nn.Module:
        """The first norm of the image tower's last block."""
        if hasattr(self.model.visual, "trunk"):
            return self.model.visual.trunk.blocks[-1].norm1
        return self.model.visual.transformer.resblocks[-1].ln_1

    def transform(self, image: Image.Image) -> Tensor:
        pixels: Tensor = image_transform_v2(PreprocessCfg(**self.model.visual.preprocess_cfg), is_train=False)(image)
        return pixels[None]

    def directions(self, *texts: str) -> Tensor:
        """Text embeddings by open_clip itself, each of length 1."""
        with torch.no_grad():
            return self.model.encode_text(open_clip.get_tokenizer(f"local-dir:{self.path}")(texts), normalize=True)


def save(path: Path, kind: str, *, seed: int = 0, weights_of: Any = None, **changes: Any) -> Folder:
    """A folder of a model's configuration and weights.

    Args:
        path: Where to.
        kind: Of CONFIGS.
        seed: Of its weights.
        weights_of: Another model, whose weights it gets instead.
        changes: Of the configuration.
    """
    path.mkdir()
    config = {**CONFIGS[kind], **changes}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESSING}))
    if "hf_tokenizer_name" in config["text_cfg"]:
        save_tokenizer(path)
    model: Any = open_clip.create_model(f"local-dir:{path}", load_weights=False, pretrained_image=False)
    if weights_of is None:
        foreign.randomise(model, seed)
    else:
        model.load_state_dict(weights_of.state_dict())
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path / "open_clip_model.safetensors"
    )
    return Folder(path, model.eval())


def save_tokenizer(path: Path) -> None:
    """A tokenizer of transformers', as folders of SigLIP have one: a token for each word, an end, and padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)


@contextmanager
def served(root: Path, models: Sequence[Mapping[str, object]] = (), **settings: Any) -> Iterator[cdam.Client]:
    """A client of a server in this process; commands that run beside it say on stderr what they say alone."""
    if models:
        settings["models_file"] = root / "models.yaml"
        settings["models_file"].write_text(json.dumps({"models": models}))
    logs.configure("console", "error")
    with in_this_process.served(data_dir=root / "data", **settings) as address, cdam.Client(address) as client:
        yield client
