"""Where to compute."""

from __future__ import annotations

import torch

from cdam_server.settings.load_error import LoadError, reason


def find_device(name: str) -> torch.device:
    """The device of a name; of "auto" a GPU if there is one, else the CPU.

    Raises:
        LoadError: torch knows no such device, or can't use it on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # of `meta` there are no numbers
    except (RuntimeError, AssertionError) as error:
        raise LoadError("device", f"{name} can't be used here ({reason(error)})") from error
    return device
