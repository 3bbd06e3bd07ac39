"""Weights from files into a model: read, find the model's among them, compare with the model, load."""

from cdam_server.compute.weights.files import Checkpoint, StateDict, checkpoint_of, read_checkpoint
from cdam_server.compute.weights.heads import attach_head
from cdam_server.compute.weights.load import NO_REPORT, Report, Wish, load_weights
from cdam_server.settings.load_error import LoadError

__all__ = [
    "NO_REPORT",
    "Checkpoint",
    "LoadError",
    "Report",
    "StateDict",
    "Wish",
    "attach_head",
    "checkpoint_of",
    "load_weights",
    "read_checkpoint",
]
