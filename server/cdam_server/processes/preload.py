"""Imported where all children are forked from, and nowhere else: what they need is loaded once."""

import gc

import cdam_server.processes.children  # noqa: F401 - for all that it imports

gc.collect()
gc.freeze()  # else the first full collection of a child would write to every object, and so copy what all share
