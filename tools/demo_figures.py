"""Measures the demo's shipped weights on scenes of test sources only, and their concepts: `python tools/demo_figures.py`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from cdam_engine import Explainer
from cdam_server.demo import model as demo_model
from cdam_server.demo.scenes import Split
from demo_model import concepts, figures


def main() -> None:
    """Prints the shipped model's figures as JSON, and its concepts' as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--write", action="store_true", help="put them in the place of the shipped ones, too")
    arguments = parser.parse_args()
    split: Split = arguments.split
    model = demo_model.load()
    held_out = asdict(figures.measure(model, split))
    print(json.dumps(held_out, indent=2))
    of_concepts = concepts.measure(Explainer(model), split)
    print(concepts.table(of_concepts))
    if arguments.write:
        shipped = demo_model.shipped_figures() | {"held_out": held_out, "concepts": asdict(of_concepts)}
        (Path(figures.__file__).parent / "assets" / "figures.json").write_text(json.dumps(shipped, indent=2) + "\n")


if __name__ == "__main__":
    main()
