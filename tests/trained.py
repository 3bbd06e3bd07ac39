"""What `cdam train` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from killing import kill_and_repeat


def read_card(weights: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(weights.with_suffix(".json").read_text())
    return content


def check_same_when_killed(command: Sequence[str], folder: Path, kept: Sequence[str]) -> None:
    """Training that is killed and given again writes the weights and the card that it writes undisturbed.

    Args:
        command: What trains, without the file that it writes.
        folder: Where it may write.
        kept: Files that change whenever it keeps something, in its folder of work.
    """
    whole, killed = folder / "whole.safetensors", folder / "killed.safetensors"
    kill_and_repeat([*command, "-o", str(whole)], whole, [], kills=0)
    kill_and_repeat([*command, "-o", str(killed)], killed, [folder / "killed.work" / file for file in kept])
    expected, found = load_file(whole), load_file(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    one, other = read_card(whole), read_card(killed)
    for card in (one, other):
        del card["started"], card["seconds"]
    assert one == other
