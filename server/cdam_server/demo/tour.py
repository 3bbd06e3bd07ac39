"""What `make demo` runs: a server of the demo model, a sample scene and a concept explained over gRPC, overlays as PNG."""

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import cdam

_SAMPLES: Final = files("cdam_server.demo") / "assets" / "samples"
_LOOP_SCENE: Final = 1  # the first sample of two digits that has a loop and a digit without one


def loop_images() -> tuple[list[Traversable], list[Traversable]]:
    """What the sample concept is made of: images of digits with a closed loop, and of digits without."""
    images = sorted((_SAMPLES / "loops").iterdir(), key=lambda image: image.name)
    positives = [image for image in images if image.name.startswith("positive")]
    return positives, [image for image in images if image.name.startswith("negative")]


def main() -> None:
    """Start a server, explain a scene for two classes and one for a concept, write the overlays, stop the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the overlays (%(default)s)")
    parser.add_argument("--scene", type=int, choices=range(1, 7), default=5, help="sample scene (%(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    api, admin = _free_ports(2)
    command = [sys.executable, "-m", "cdam_cli", "serve", "--log-level", "warning"]
    command += ["--address", f"127.0.0.1:{api}", "--admin-address", f"127.0.0.1:{admin}"]
    print(f"$ cdam serve --address 127.0.0.1:{api} --admin-address 127.0.0.1:{admin}")
    with TemporaryDirectory() as concepts:
        server = subprocess.Popen([*command, "--data-dir", concepts])  # noqa: S603 - our own command
        try:
            with cdam.Client(f"127.0.0.1:{api}") as client:
                _explain_scene(client, arguments.scene, arguments.out)
                _explain_concept(client, arguments.out)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(timeout=60)
    print(f"server stopped, exit code {code}")
    print("next: .venv/bin/cdam serve, and in another shell .venv/bin/cdam explain IMAGE -o out")
    sys.exit(code)


def _explain_scene(client: cdam.Client, number: int, out: Path) -> None:
    sample = json.loads((_SAMPLES / "samples.json").read_text())["samples"][number - 1]
    targets = [item["label"] for item in sample["objects"]][:2]
    with as_file(_SAMPLES / sample["image"]) as scene:
        client.wait_until_ready(timeout=120)
        model = client.model()
        print(
            f"model {model.name}: {model.patch_grid[0]} x {model.patch_grid[1]} patches, {model.output_count} classes"
        )
        started = time.perf_counter()
        explanation = client.explain(scene, targets)
        milliseconds = 1000 * (time.perf_counter() - started)
        print(f"explained {sample['image']} for {' and '.join(targets)} in {milliseconds:.0f} ms")
        for relevance in explanation:
            assert relevance.target is not None
            path = out / f"scene{number}_{relevance.label}.png"
            relevance.overlay(scene, zoom=6).save(path)
            print(
                f"  digit {relevance.label}: probability {relevance.target.probability or 0:.2f}, "
                f"{_evidence(relevance)}  -> {path}"
            )
        sheet = out / f"scene{number}.png"
        cdam.render.sheet(explanation, scene, shared_scale=False).save(sheet)
        print(f"  side by side -> {sheet}")


def _explain_concept(client: cdam.Client, out: Path) -> None:
    """What no class is: digits with a closed loop, shown by images alone."""
    with ExitStack() as stack:
        positives, negatives = ([stack.enter_context(as_file(image)) for image in side] for side in loop_images())
        concept = client.register_concept(
            "loops", positives, negatives=negatives, replace=True, description="digits with a closed loop"
        )
        print(
            f"registered concept {concept.name}: {concept.example_count} images that show a loop less "
            f"{concept.negative_count} that don't, spread {concept.spread:.2f}"
        )
        scene = stack.enter_context(as_file(_SAMPLES / f"scene{_LOOP_SCENE}.png"))
        explanation = client.explain(scene, cdam.Concept("loops"))
        path = out / f"scene{_LOOP_SCENE}_loops.png"
        cdam.render.sheet(explanation, scene).save(path)
        print(f"  {scene.name}: {_evidence(explanation.maps[0])}  -> {path}")


def _evidence(relevance: cdam.RelevanceMap) -> str:
    scores = relevance.scores
    return f"evidence {scores.clip(min=0).sum():+.2f}, counter-evidence {scores.clip(max=0).sum():+.2f}"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


if __name__ == "__main__":
    main()
