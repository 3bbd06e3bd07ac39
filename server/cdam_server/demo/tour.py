"""What `make demo` runs: a server of the demo model, a sample scene explained over gRPC, overlays as PNG."""

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
from importlib.resources import as_file, files
from pathlib import Path

import cdam


def main() -> None:
    """Start a server, explain a scene for two classes, write the overlays, stop the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the overlays (%(default)s)")
    parser.add_argument("--scene", type=int, choices=range(1, 7), default=5, help="sample scene (%(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    api, admin = _free_ports(2)
    command = [sys.executable, "-m", "cdam_server.cli", "serve", "--log-level", "warning"]
    command += ["--address", f"127.0.0.1:{api}", "--admin-address", f"127.0.0.1:{admin}"]
    print(f"$ cdam serve --address 127.0.0.1:{api} --admin-address 127.0.0.1:{admin}")
    server = subprocess.Popen(command)  # noqa: S603 - our own command
    try:
        _explain_scene(f"127.0.0.1:{api}", arguments.scene, arguments.out)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
    print(f"server stopped, exit code {code}")
    print("next: .venv/bin/cdam serve, and in another shell .venv/bin/cdam explain IMAGE -o out")
    sys.exit(code)


def _explain_scene(address: str, number: int, out: Path) -> None:
    samples = files("cdam_server.demo") / "assets" / "samples"
    sample = json.loads((samples / "samples.json").read_text())["samples"][number - 1]
    targets = [item["label"] for item in sample["objects"]][:2]
    with cdam.Client(address) as client, as_file(samples / sample["image"]) as scene:
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
                f"evidence {relevance.scores.clip(min=0).sum():+.2f}, "
                f"counter-evidence {relevance.scores.clip(max=0).sum():+.2f}  -> {path}"
            )
        sheet = out / f"scene{number}.png"
        cdam.render.sheet(explanation, scene, shared_scale=False).save(sheet)
        print(f"  side by side -> {sheet}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


if __name__ == "__main__":
    main()
