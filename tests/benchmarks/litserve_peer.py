"""CDAM over HTTP as it is built from parts: LitServe for the service, captum for the maps.

    python tests/benchmarks/litserve_peer.py --model vit_small_patch16_224 --port 8000

The peer of `service`. POST /predict takes {"image": base64 of an encoded image, "class": index} and answers
{"scores": base64 of float32, one a patch}. JSON, as LitServe pickles a request on its way to the worker, and of a
form that would be an open file.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from cdam_server.demo import model as demo

try:
    import litserve  # type: ignore[import-untyped]
    from captum.attr import LayerGradientXActivation
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing: the peer is built with litserve and captum, both in the extra `dev`")

DEMO = "demo"


def load(name: str) -> Any:
    """The model that `cdam serve --model NAME --random-weights` serves: timm's of that name, or the demo's."""
    torch.manual_seed(0)
    model: Any = demo.load() if name == DEMO else timm.create_model(name, pretrained=False)
    return model.eval().requires_grad_(requires_grad=False)


class CdamApi(litserve.LitAPI):  # type: ignore[misc]
    """CDAM of batches of images, one class each.

    Args:
        model: timm's name of the model, or "demo".
        threads: Compute threads of the worker; 0: torch's choice.
        zeros: Compute nothing, and answer with scores of zero: what is left is LitServe itself.
        **batching: LitServe's.
    """

    def __init__(self, model: str, *, threads: int = 0, zeros: bool = False, **batching: Any) -> None:
        super().__init__(**batching)
        self._name, self._threads, self._zeros = model, threads, zeros

    def setup(self, device: str) -> None:
        """Load the model; called in the worker."""
        if self._threads:
            torch.set_num_threads(self._threads)
        self._model = load(self._name).to(device)
        self._device = device
        self._transform = create_transform(**resolve_model_data_config(self._model), is_training=False)
        self._attribution = LayerGradientXActivation(self._model, self._model.blocks[-1].norm1)

    # Without an annotation LitServe hands over the parsed JSON; with one, FastAPI checks it first.
    def decode_request(self, request) -> tuple[Tensor, int]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        """The image, normalised, shape (3, H, W), and its class."""
        with Image.open(io.BytesIO(base64.b64decode(request["image"]))) as image:
            pixels: Tensor = self._transform(image.convert("RGB"))
        return pixels, request["class"]

    def batch(self, inputs: list[tuple[Tensor, int]]) -> tuple[Tensor, list[int]]:
        """All images as one tensor, and their classes."""
        pixels, classes = zip(*inputs, strict=True)
        return torch.stack(pixels), list(classes)

    def predict(self, x: tuple[Tensor, list[int]]) -> NDArray[np.float32]:
        """The scores of all patches, shape (B, patches)."""
        pixels, classes = x
        if self._zeros:
            return np.zeros((len(pixels), self._model.patch_embed.num_patches), np.float32)
        found: Tensor = self._attribution.attribute(pixels.to(self._device), target=classes)
        scores: NDArray[np.float32] = found.detach().sum(-1)[:, self._model.num_prefix_tokens :].cpu().numpy()
        return scores

    def unbatch(self, output: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """One row an image."""
        return list(output)

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, str]:
        """The scores, raw and signed."""
        return {"scores": base64.b64encode(output.tobytes()).decode()}


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help=f'name in timm, or "{DEMO}"')
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch-size", type=int, default=16)
    parser.add_argument("--batch-timeout", type=float, default=0.01, help="seconds that a batch is waited for")
    parser.add_argument("--workers", type=int, default=1, help="processes that compute")
    parser.add_argument("--threads", type=int, default=0, help="of each worker; 0: torch's choice")
    parser.add_argument("--zeros", action="store_true", help="compute nothing")
    parser.add_argument("--fast-queue", action=argparse.BooleanOptionalAction, default=True, help="answers by ZeroMQ")
    arguments = parser.parse_args()
    api = CdamApi(
        arguments.model,
        threads=arguments.threads,
        zeros=arguments.zeros,
        max_batch_size=arguments.max_batch_size,
        batch_timeout=arguments.batch_timeout,
    )
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=arguments.workers, fast_queue=arguments.fast_queue
    )
    server.run(
        host="127.0.0.1",
        port=arguments.port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
    os._exit(0)


if __name__ == "__main__":
    main()
