"""How the actor's interpreter divides its time: between threads, and with the search for garbage."""

from __future__ import annotations

import gc
import sys

SWITCH_S = 0.0005
"""After so long a tool that computes in Python lets go of the interpreter, each time that another thread asks."""


def divide_time() -> None:
    """For the whole process."""
    sys.setswitchinterval(SWITCH_S)


def spare_what_is_loaded() -> None:
    """Leave what there is out of every later search for garbage: libraries and a model are a million objects that stay,
    and a search through all of them holds every thread up, the event loops too."""
    gc.collect()
    gc.freeze()
