"""Doors: the parts that a configuration names, built-in ones and a user's own ``package.module:name`` alike.

A door names the field of the configuration that chooses, what it is called with and must have, and where the built-in
ones lie: one module each in ``package`` (``mine.py`` there *is* the built-in ``mine``; its object is called
``attribute``), or ``built_in``, name -> ``module:object``.  Names are checked without importing what they stand for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Generic, TypeVar

from atpo_async.core.calls import is_async, methods_not_async, misfit
from atpo_async.core.errors import AtpoError, ConfigError, SetupError
from atpo_async.core.texts import of_error, of_type, own_line

T = TypeVar("T")
Option = bool | int | float | str

BESIDE = Path(__file__).resolve().parents[2]
"""Holds the packages of this program."""


@dataclass(frozen=True, kw_only=True)
class Door(Generic[T]):
    """One kind of thing that a configuration names; ``load`` (a function) or ``make`` (an object) gives a ``T``."""

    field: str
    """Dotted path of the configuration's field, for messages: ``objective.surrogate``."""
    what: str
    """For messages, with its article: ``a surrogate``."""
    protocol: str
    """Where its protocol is documented: ``docs/extending.md, "Surrogate"``."""
    options: str = ""
    """Dotted path of the field with its options: ``objective.surrogate_options``; empty where each name has its own."""
    options_by_name: str = ""
    """Dotted path of the field with a table of options for each name: ``metrics.options``."""
    package: str = ""
    attribute: str = ""
    hyphens: bool = False
    """Names of built-in ones are written with ``-`` where their modules have ``_``."""
    built_in: Mapping[str, str] = dataclasses.field(default_factory=dict)
    words: tuple[str, ...] = ()
    """Words that are taken in place of a name, such as ``none`` and ``auto``.  The caller decides what they mean."""
    call: tuple[str, ...] = ()
    """What it is called with, by position; ``**options`` come on top."""
    parts: tuple[str, ...] = ()
    """Attributes of what ``make`` returns; empty for a door whose functions are called themselves (``load``)."""
    coroutines: tuple[str, ...] = ()
    """Those of ``parts`` that are awaited, and so must be ``async def``."""

    plain: tuple[str, ...] = ()
    """Those of ``parts`` that are called and not awaited, and so must not be ``async def``."""

    def names(self) -> tuple[str, ...]:
        """Of the built-in ones, in order of the alphabet."""
        return tuple(sorted({*self.built_in, *self._modules()}))

    def choices(self) -> tuple[str, ...]:
        """Names of the built-in ones, and the words that may stand in their place."""
        return (*self.names(), *(word for word in self.words if word not in self.names()))

    def check(self, name: str) -> None:
        """Raises ConfigError where ``name`` is no choice and does not look like ``package.module:name``; imports
        nothing."""
        if name not in self.words:
            self.target(name)

    def _modules(self) -> tuple[str, ...]:
        if not self.package:
            return ()
        root, *inner = self.package.split(".")
        stems = (file.stem for folder in _folders(root) for file in Path(folder, *inner).glob("[a-z]*.py"))
        return tuple(stem.replace("_", "-") if self.hyphens else stem for stem in stems)

    def target(self, name: str) -> str:
        """``module:object`` of a name.  Raises ConfigError where it is neither a built-in one's nor of that form."""
        if name in self.built_in:
            return self.built_in[name]
        if name in self._modules():
            return f"{self.package}.{name.replace('-', '_') if self.hyphens else name}:{self.attribute}"
        module, colon, attribute = name.partition(":")
        if module == "__main__" and colon:
            raise ConfigError(
                f"{self.field} = {name!r}: the processes of a run cannot see what a script or a notebook defines: put "
                "it into a module in the working folder, and name it 'module:name'"
            )
        if not (colon and attribute.isidentifier() and _is_module(module)) or module.endswith(".py"):
            near = difflib.get_close_matches(name, self.choices(), n=1, cutoff=0.7) or _written_otherwise(name)
            meant = f"did you mean {near[0]}?  Known" if near else "known"
            raise ConfigError(
                f"{self.field} = {name!r} is unknown; {meant}: {', '.join(self.choices())}, "
                f"or 'package.module:name' for {self.what} of your own"
            )
        return name

    def load(self, name: str, options: Mapping[str, Option] | None = None) -> T:
        """The function of that name, with ``options`` bound to it by keyword.

        Raises:
            ConfigError: there is none of that name, or it cannot be called as this door calls it.
            SetupError: its module cannot be imported.
        """
        found = self.offered(name, options)
        return functools.partial(found, **options) if options else found  # type: ignore[return-value]

    def make(self, name: str, *args: Any, options: Mapping[str, Option] | None = None) -> T:
        """What the class or factory of that name makes of ``args`` and ``options``.

        Raises:
            ConfigError: there is none of that name, it does not take these, or what it returns lacks a part.
            SetupError: its module cannot be imported, or it fails.
        """
        factory = self.offered(name, options)
        try:
            with _working_folder_stays():
                made = factory(*args, **(options or {}))
        except AtpoError:
            raise
        except BaseException as exc:  # exit() too
            raise SetupError(f"{self.field} = {name!r} could not be made: {of_error(exc)}{_at(exc)}") from exc
        self._check_made(name, made)
        return made  # type: ignore[no-any-return]

    def offered(self, name: str, options: Mapping[str, Option] | None = None) -> Callable[..., Any]:
        """The function, class or factory of that name, checked as far as it can be without being called.

        Raises:
            ConfigError: there is none of that name, it is of another kind, or it cannot be called as this door does.
            SetupError: its module cannot be imported.
        """
        found = self.imported(name)
        self._check_kind(name, found)
        self._check_call(name, found, options or {})
        return found

    def imported(self, name: str) -> Callable[..., Any]:
        """The function, class or factory of that name, not called yet.

        Raises:
            ConfigError: there is none of that name.
            SetupError: its module cannot be imported.
        """
        target = self.target(name)
        module_name, _, attribute = target.partition(":")
        if target != name:
            _import_ours(module_name.partition(".")[0])
        try:
            with _working_folder_stays():
                module = importlib.import_module(module_name)
        except BaseException as exc:  # a user's module may fail in any way while it is imported, and exit() too
            failed = f"module {module_name!r} cannot be imported: {of_error(exc)}"
            said = str(exc) if isinstance(exc, AtpoError) else failed
            raise SetupError(
                f"{self.field} = {name!r}: {said}{_at(exc)}{_near_module(exc, module_name)}{shadowed()}"
            ) from exc
        found = getattr(module, attribute, None)
        if not callable(found):
            where = getattr(module, "__file__", None) or "no file"
            state = "has no" if found is None else f"has no function or class, but {_article(of_type(found))}, as"
            near = difflib.get_close_matches(attribute, [n for n in vars(module) if n[0] != "_"], n=1, cutoff=0.7)
            meant = f"; did you mean {module_name}:{near[0]}?" if near and found is None else ""
            raise ConfigError(
                f"{self.field} = {name!r}: module {module_name!r} ({where}) {state} {attribute!r}{meant}{shadowed()}"
            )
        return found  # type: ignore[no-any-return]

    def _check_kind(self, name: str, found: Callable[..., Any]) -> None:
        """Raises ConfigError for a class where a function is called, and for what is async and must not be."""
        if self.parts and is_async(found):
            raise ConfigError(
                f"{self.field} = {name!r}: its factory is async; make it a plain function, and await later what must be"
            )
        if self.parts and inspect.isclass(found):
            self._refuse_plain(name, found, methods_not_async(found, self.coroutines))
            self._refuse_async(name, found, found)
        if not self.parts and is_async(found):
            raise ConfigError(
                f"{self.field} = {name!r} is async (async def): {self.what} is called and not awaited; make it a plain "
                f"function; see {self.protocol}"
            )
        if not self.parts and inspect.isclass(found):
            raise ConfigError(
                f"{self.field} = {name!r} is a class: {self.what} is a function, or an object that is called like one; "
                f"make such an object in the module and give its name; see {self.protocol}"
            )

    def _refuse_plain(self, name: str, kind: type, plain: list[str]) -> None:
        if plain:
            raise ConfigError(
                f"{self.field} = {name!r}: {kind.__name__} is not {self.what}: {', '.join(plain)} must be async "
                f"(async def); see {self.protocol}"
            )

    def _refuse_async(self, name: str, kind: type, owner: object) -> None:
        awaited = [part for part in self.plain if is_async(getattr(owner, part, None))]
        if awaited:
            raise ConfigError(
                f"{self.field} = {name!r}: {kind.__name__} is not {self.what}: {', '.join(awaited)} must not be async, "
                f"for nothing awaits it; see {self.protocol}"
            )

    def _check_call(self, name: str, found: Callable[..., Any], options: Mapping[str, Option]) -> None:
        """Raises ConfigError where ``found(*call, **options)`` cannot be called like that."""
        try:
            signature = inspect.signature(found)
        except (ValueError, TypeError):
            return  # built-ins have no signature; the call itself raises what is wrong
        try:
            signature.bind(*self.call, **options)
        except TypeError as exc:
            takes = ", ".join(
                p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            )
            called = ", ".join((*self.call, "**options"))
            unknown = next((word for word in options if word not in signature.parameters), "")
            near = difflib.get_close_matches(unknown, set(signature.parameters) - set(self.call), n=1)
            meant = f" (did you mean {near[0]!r}?)" if unknown and near else ""
            raise ConfigError(
                f"{self.field} = {name!r} with options {dict(options)!r}: {exc}{meant}; {self.what} is called as "
                f"({called}), {self.target(name)} takes ({takes}); see {self.protocol}"
            ) from None
        if wrong := misfit(found, options):
            raise ConfigError(f"{self.field} = {name!r} with options {dict(options)!r}: {wrong}")

    def _check_made(self, name: str, made: object) -> None:
        if inspect.isawaitable(made):
            if inspect.iscoroutine(made):
                made.close()
            raise ConfigError(
                f"{self.field} = {name!r}: its factory is async; make it a plain function, and await later what must be"
            )
        if made is None:
            raise ConfigError(f"{self.field} = {name!r}: its factory returned None; it must return {self.what}")
        missing = [part for part in self.parts if not _has(made, part)]
        if missing:
            raise ConfigError(
                f"{self.field} = {name!r}: {type(made).__name__} is not {self.what}: it lacks {', '.join(missing)}; "
                f"see {self.protocol}"
            )
        self._refuse_plain(name, type(made), [p for p in self.coroutines if not is_async(getattr(made, p))])
        self._refuse_async(name, type(made), made)


def _folders(root: str) -> Iterable[str | Path]:
    """Where the modules of a top-level package lie; imports nothing, and a package of ours is the one beside this one,
    whatever ``buffer.py`` the user has."""
    beside = BESIDE / root
    if beside.is_dir():
        return (beside,)
    spec = importlib.util.find_spec(root)
    return (spec.submodule_search_locations if spec is not None else None) or ()


def _import_ours(root: str) -> None:
    """Imports a top-level package of this program from beside this one.  Raises SetupError where a module of the user's
    has its name already."""
    beside = BESIDE / root / "__init__.py"
    if not beside.is_file():
        return
    found = sys.modules.get(root)
    if found is None:
        # By import alone a user's learner.py beside the script would be taken for the package.
        spec = PathFinder.find_spec(root, [str(BESIDE)])
        if spec is not None and spec.loader is not None:
            sys.modules[root] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return
    file = getattr(found, "__file__", None)
    if file is None or not beside.samefile(file):
        raise SetupError(
            f"{file or root} was imported under the name of this program's package {root!r} ({beside.parent}); "
            "give it another name"
        )


def _is_module(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _written_otherwise(name: str) -> list[str]:
    """``losses:sapo`` for ``losses.sapo``, ``losses.py:sapo`` and ``./losses.py:sapo``."""
    module, colon, attribute = name.partition(":")
    if not colon:
        module, _, attribute = name.rpartition(".")
    meant = module.removesuffix(".py").removeprefix("./").replace("/", ".")
    return [f"{meant}:{attribute}"] if attribute.isidentifier() and _is_module(meant) else []


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@contextlib.contextmanager
def _working_folder_stays() -> Iterator[None]:
    """A user's module may change the working folder; relative paths of the run stay what they are."""
    try:
        before = os.getcwd()
    except OSError:  # it was deleted
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.chdir(before)


def _at(exc: BaseException) -> str:
    """`` (at shop.py:12, in make: …)``: the user's own line; empty without one."""
    line = own_line(exc, apart_from=BESIDE)
    return f" (at {line})" if line else ""


def _near_module(exc: BaseException, name: str) -> str:
    """A module of the working folder that may have been meant."""
    if not isinstance(exc, ModuleNotFoundError) or exc.name != name:
        return ""
    with contextlib.suppress(OSError):
        near = difflib.get_close_matches(name, [path.stem for path in Path.cwd().glob("*.py")], n=1, cutoff=0.6)
        return f"; did you mean {near[0]!r}?" if near else f"; there is no {name}.py in {Path.cwd()}"
    return ""


def _has(made: object, part: str) -> bool:
    """Whether the attribute exists; true also of a property that fails: the code that reads it reports the failure."""
    return part in dir(made) or hasattr(made, part)


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
