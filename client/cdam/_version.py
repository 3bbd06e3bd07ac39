"""The version that is installed."""

from importlib import metadata

try:
    __version__ = metadata.version("cdam-serve")
except metadata.PackageNotFoundError:  # run from a checkout
    __version__ = "0"
