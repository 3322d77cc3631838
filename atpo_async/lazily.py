"""Names of a package that are loaded when they are asked for, so that importing the package alone stays light."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def loaded_from(modules: Mapping[str, str], *, package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package.

    Args:
        modules: name -> the module that it comes from.
        package: the package's ``__name__``.
    """

    def load(name: str) -> Any:
        """Raises AttributeError."""
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return load
