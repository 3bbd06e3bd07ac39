"""What all children are forked from."""

import subprocess
import sys

_COUNT = """
import gc, sys
import cdam_server.processes.preload
print(gc.get_freeze_count(), len(gc.get_objects()), "torch" in sys.modules)
"""


def test_what_children_share_is_kept_out_of_their_collections() -> None:
    told = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=True, timeout=120)
    frozen, others, torch = told.stdout.split()
    assert int(frozen) > 100_000
    assert int(others) < 1000  # made since
    assert torch == "True"
