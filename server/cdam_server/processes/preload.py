"""Imported where all children are forked from, and nowhere else: what they need is loaded once."""

import atexit
import gc
import signal

import cdam_server.processes.children  # noqa: F401 - for all that it imports

# A signal to all processes at once is for the supervisor alone; this one ends when that has ended.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
gc.collect()
gc.freeze()  # else the first full collection of a child would write to every object, and so copy what all share
# Libraries look at their end for what was never collected.
atexit.register(gc.unfreeze)
