"""What the roles share: vocabulary, wire, configuration, run folder, command line; and the Python door.

``from atpo_async import load, train, evaluate, open_run`` trains, evaluates and reads runs without the command line.
They are loaded when they are asked for: ``import atpo_async`` alone stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.lazily import loaded_from

if TYPE_CHECKING:
    from atpo_async.api.configuration import load
    from atpo_async.api.evaluation import EvalResult, evaluate
    from atpo_async.api.run import Run, open_run
    from atpo_async.api.training import train
    from atpo_async.config import Config

__version__ = "0.1.0"

__all__ = ["Config", "EvalResult", "Run", "__version__", "evaluate", "load", "open_run", "train"]

_DOOR = {
    "Config": "atpo_async.config",
    "load": "atpo_async.api.configuration",
    "EvalResult": "atpo_async.api.evaluation",
    "Run": "atpo_async.api.run",
    "evaluate": "atpo_async.api.evaluation",
    "open_run": "atpo_async.api.run",
    "train": "atpo_async.api.training",
}
"""Name -> the module that it comes from."""

__getattr__ = loaded_from(_DOOR, package=__name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *_DOOR})
