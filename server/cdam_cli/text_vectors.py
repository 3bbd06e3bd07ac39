"""From texts to vectors in the latent space of a CLIP model's image tower, with open_clip; on the client's side.

    text = TextModel.load("ViT-B-32", "laion2b_s34b_b79k")
    cat = text.vector(["a photo of a cat", "a close-up photo of a cat"])
    client.register_concept("cat", vector=cat, model="clip")
    client.explain("photo.jpg", cdam.Concept("cat", similarity="cosine"), model="clip")

The served model must be the image tower of the same training, its latent the image embedding in the space that both
towers share: `docs/concepts.md` says how to serve one. `TextModel.image_vector` proves it, as `cdam concept text` does.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdam_server.settings.load_error import reason

__all__ = ["TextModel", "TextModelError", "check_installed"]

_OWN_WEIGHTS: Final = ("hf-hub:", "local-dir:")
_LEAST_DIFFERENCE: Final = 1e-4
"""Length below which a difference of two unit vectors is rounding, in float32, and no direction."""


class TextModelError(ValueError):
    """A text model can't be had, or a text can't be put into a vector.

    Attributes:
        setting: What to look at: ``text-model``, ``text-weights``, ``prompt``, or ``negative``; "" if open_clip is not
            installed.
    """

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


def check_installed() -> None:
    """Raises TextModelError if open_clip is not installed."""
    if find_spec("open_clip") is None:
        raise TextModelError("", "open_clip is needed for texts: pip install 'cdam-serve[clip]'")


@dataclass(frozen=True, eq=False)
class TextModel:
    """A CLIP model of open_clip, in float32 on the CPU.

    Attributes:
        name: As open_clip has it.
        weights: Tag or file; "" if `name` brings them.
        model: The model.
        tokenizer: Its tokenizer.
    """

    name: str
    weights: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str, weights: str | Path | None = None) -> TextModel:
        """Load a model with its weights.

        Args:
            name: ViT-B-32 and the like; ``hf-hub:ORG/NAME`` or ``local-dir:PATH`` with open_clip_config.json and
                weights.
            weights: For a plain name: a tag of open_clip's, whose weights come from the hub, or a file.

        Raises:
            TextModelError: open_clip is not installed, knows no such model or weights, can't get them, or they are not
                this model's.
        """
        check_installed()
        import open_clip

        given = "" if weights is None else str(weights)
        setting = _check(open_clip, name, given)
        try:
            with _quiet():
                model = open_clip.create_model(
                    name,
                    pretrained=given or None,
                    precision="fp32",
                    device="cpu",
                    require_pretrained=True,  # or it would go on with random weights
                    pretrained_image=False,
                    pretrained_text=False,
                )
                tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise TextModelError(setting, f"{given or name} can't be loaded ({reason(error)})") from error
        return cls(name, given, model.eval().requires_grad_(False), tokenizer)

    def vector(self, prompts: Sequence[str], negatives: Sequence[str] = ()) -> NDArray[np.float32]:
        """The vector of a concept that texts describe.

        With n(x) = x / |x| and t, u the embeddings of prompts and negatives: v = n(mean_i n(t_i)), and if there are
        negatives, v = n(mean_i n(t_i)) - n(mean_j n(u_j)), which is not brought to length 1 again.

        Args:
            prompts: What it shows, at least one; several say the same in other words.
            negatives: What it does not show.

        Returns:
            float32, shape (embedding length).

        Raises:
            TextModelError: A text is empty or too long, or negatives and prompts say the same.
        """
        positive = self._direction(prompts, "prompt")
        if not negatives:
            return positive.astype(np.float32)
        difference: NDArray[np.float64] = positive - self._direction(negatives, "negative")
        if np.linalg.norm(difference) < _LEAST_DIFFERENCE:
            raise TextModelError("negative", "says the same as the prompts: nothing is left of their difference")
        return difference.astype(np.float32)

    def _direction(self, texts: Sequence[str], setting: str) -> NDArray[np.float64]:
        """n(mean n(embedding)), shape (E)."""
        import torch

        if isinstance(texts, str):
            raise TextModelError(setting, f"{texts!r} is one text where a list of texts belongs")
        if not texts:
            raise TextModelError(setting, "at least one text is needed")
        for text in texts:
            self._check_text(text, setting)
        with torch.inference_mode():
            embeddings = self.model.encode_text(self.tokenizer(list(texts))).double().numpy()
        return _unit(_unit(embeddings).mean(0))

    def _check_text(self, text: str, setting: str) -> None:
        """Refuses what is empty, and what the tokenizer would cut off without a word."""
        if not text.strip():
            raise TextModelError(setting, "a text is empty")
        # One more place is filled by padding, or else by a token that did not fit.
        pad = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", None) or 0
        length = self.tokenizer.context_length
        padding = [int((self.tokenizer([text], context_length=n) == pad).sum()) for n in (length, length + 1)]
        if padding[1] <= padding[0]:
            raise TextModelError(setting, f"{text[:60]!r}... is longer than the {length} tokens that {self.name} reads")

    def image_vector(self, image: Image.Image) -> NDArray[np.float32]:
        """The image embedding, not normalised, shape (E): the latent of a served model of the same training."""
        import torch
        from open_clip.transform import PreprocessCfg, image_transform_v2

        transform: Any = image_transform_v2(PreprocessCfg(**self.model.visual.preprocess_cfg), is_train=False)
        with torch.inference_mode():
            embedding: NDArray[np.float32] = self.model.encode_image(transform(image)[None])[0].float().numpy()
        return embedding

    def probe(self) -> Image.Image:
        """An image of exactly the image tower's input size, so that nothing has to be resized: a colour wash and noise."""
        size = self.model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        wash = np.stack([down, across, (1 - down) * across], -1) * 200
        noise = np.random.default_rng(0).uniform(0, 55, (height, width, 3))
        return Image.fromarray((wash + noise).astype(np.uint8))


def _check(open_clip: Any, name: str, weights: str) -> str:
    """Which setting is to blame if the weights can't be had.

    Raises:
        TextModelError: They can't, as is known beforehand.
    """
    if name.startswith(_OWN_WEIGHTS):
        if weights:
            raise TextModelError("text-weights", f"{name} has its own weights: leave it out")
        return "text-model"
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; is it {' or '.join(near)}?" if near else ""
        raise TextModelError("text-model", f"open_clip {open_clip.__version__} knows no {name!r}{hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not weights or not (weights in tags or Path(weights).is_file()):
        what = f"{weights} is neither a file nor a tag of {name}" if weights else f"say which weights {name} has"
        raise TextModelError("text-weights", f"{what}: a file, or one of {', '.join(tags) or '(no tag is known)'}")
    return "text-weights"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's log, which says what its errors say; its warning of a wrong activation is an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            yield
    finally:
        logging.disable(before)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each of length 1."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not (np.isfinite(lengths).all() and lengths.all()):
        raise TextModelError("text-model", "its text embeddings are not finite, or zero: these are no trained weights")
    return np.asarray(vectors / lengths)
