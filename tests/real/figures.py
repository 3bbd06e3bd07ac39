"""Print the figures of the real backbone that docs/parity.md has: `python tests/real/figures.py`.

It needs the package index or a cache of its file (`real/backbone.py`), and photographs with masks (`real/voc.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx

import cdam
from processes import serving
from real.backbone import onnx_file, state_dict
from real.classifier import build, train_and_write
from real.measures import discrimination, service_difference, token_difference
from real.voc import photographs


def main() -> None:
    voc = photographs()
    graph = onnx.load(onnx_file())
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = train_and_write(folder, state_dict(graph), voc)
        backbone, head = folder / "backbone.safetensors", folder / "head.safetensors"
        shown = voc.of_two_classes()
        tokens, cosine = token_difference(graph, build(backbone), [one.path for one in shown[:4]])
        print(f"final tokens, to the graph's: {tokens:.1e} at most, lowest cosine {cosine:.8f}")
        with serving(folder / "log", "--models-file", str(models)) as server, cdam.Client(server.address) as client:
            logits, maps = service_difference(client, build(backbone, head), shown[:4])
            print(f"service, to a full backward pass: logits {logits:.1e}, maps {maps:.1e} at most")
            print("| method | maps | own > other | energy | covered |\n|---|---|---|---|---|")
            for method, found in discrimination(client, voc, shown).items():
                shares = f"{found.own_over_other:.2f} | {found.energy:.2f} | {found.covered:.2f}"
                print(f"| `{method}` | {found.maps} | {shares} |")


if __name__ == "__main__":
    main()
