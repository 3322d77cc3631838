"""Environments by name: the built-in ones, or ``package.module:factory`` of the user's own."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from atpo_async.core.errors import AtpoError, ConfigError, SetupError
from atpo_async.core.texts import of_error
from atpo_async.environments.base import Environment

Option = bool | int | float | str
Factory = Callable[..., Environment]

BUILT_IN: dict[str, str] = {"hopqa": "atpo_async.environments.hopqa.environment:make"}
"""Name -> ``module:factory``; imported only when asked for."""


def known() -> tuple[str, ...]:
    return tuple(sorted(BUILT_IN))


def make(name: str, tokenizer: Path | str, **options: Option) -> Environment:
    """Build an environment.

    Args:
        name: a built-in name, or ``package.module:factory``, called as ``factory(tokenizer, **options)``.
        tokenizer: folder of the policy's tokenizer.
        options: ``environment.options`` of the configuration.

    Raises:
        ConfigError: no such environment, or options it does not take.
        SetupError: the user's module cannot be imported, or its factory fails.
    """
    target = BUILT_IN.get(name, name)
    factory = factory_of(name)
    _check_call(name, target, factory, options)
    try:
        made = factory(tokenizer, **options)
    except AtpoError:
        raise
    except BaseException as exc:  # exit() too
        raise SetupError(f"environment {name!r} could not be made: {of_error(exc)}") from exc
    if inspect.isawaitable(made):
        if inspect.iscoroutine(made):
            made.close()
        raise ConfigError(
            f"environment.name = {name!r}: its factory is async; make it a plain function, and do what must be awaited "
            "in the environment's start()"
        )
    if made is None:
        raise ConfigError(f"environment.name = {name!r}: its factory returned None; it must return the environment")
    missing = [part for part in ("stop_token_ids", "num_tasks", "start", "replay") if not _has(made, part)]
    if missing:
        fork = "; class MyEnvironment(ReplayFork) brings replay" if "replay" in missing else ""
        raise ConfigError(
            f"environment.name = {name!r}: its factory returned {type(made).__name__}, which is no environment: "
            f"it lacks {', '.join(missing)} (atpo_async/environments/base.py has the protocol{fork})"
        )
    return made


def _has(made: object, part: str) -> bool:
    """Also where it is a property that fails: whoever reads it says so."""
    return part in dir(made) or hasattr(made, part)


def _check_call(name: str, target: str, factory: Factory, options: dict[str, Option]) -> None:
    """Raises ConfigError where ``factory(tokenizer, **options)`` cannot be called like that."""
    try:
        signature = inspect.signature(factory)
    except (ValueError, TypeError):
        return  # built-ins have none; the call itself says what is wrong
    try:
        signature.bind("", **options)
    except TypeError as exc:
        known = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        raise ConfigError(
            f"environment.options {options!r} do not fit environment {name!r}: {exc}; it is called as "
            f"factory(tokenizer, **options), {target} takes ({', '.join(known)})"
        ) from None


def shadowed() -> str:
    """Names the user's modules in the working folder in whose place others of the same name were imported."""
    try:
        folder = Path.cwd()
        mine = {p.stem: p for p in folder.glob("*.py")} | {p.parent.name: p for p in folder.glob("*/__init__.py")}
    except OSError:
        return ""
    found = []
    for name, path in mine.items():
        file = getattr(sys.modules.get(name), "__file__", None)
        if name not in ("__main__", "__init__") and file is not None and not path.samefile(file):
            found.append(f"{path}, in whose place {file} is imported")
    return f"; give another name to {'; '.join(sorted(found)[:4])}" if found else ""


def factory_of(name: str) -> Factory:
    """Imports what makes an environment.  Raises ConfigError where there is none of that name, SetupError where its
    module cannot be imported."""
    target = BUILT_IN.get(name, name)
    module_name, colon, attribute = target.partition(":")
    if not (colon and module_name and attribute):
        raise ConfigError(
            f"environment.name = {name!r} is unknown; known: {', '.join(known())}, "
            "or 'package.module:factory' for your own"
        )
    try:
        module = importlib.import_module(module_name)
    except BaseException as exc:  # a user's module may fail in any way while it is imported, and exit() too
        raise SetupError(
            f"environment.name = {name!r}: module {module_name!r} cannot be imported: {of_error(exc)}{shadowed()}"
        ) from exc
    factory = getattr(module, attribute, None)
    if not callable(factory):
        where = getattr(module, "__file__", None) or "no file"
        raise ConfigError(
            f"environment.name = {name!r}: module {module_name!r} ({where}) has no factory {attribute!r}{shadowed()}"
        )
    return cast(Factory, factory)
