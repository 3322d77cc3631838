"""``@tool``: a function that a policy may call, with its schema, its limits, and what its failure means."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, overload

from atpo_async.core.calls import is_async
from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_type, of_value
from atpo_async.environments.messages.types import ToolSchema
from atpo_async.environments.tools.arguments import Arguments
from atpo_async.environments.tools.docstrings import described

MAX_TOKENS = 1024
"""Of an answer, unless the tool says otherwise."""

AtFault = Literal["fail", "answer"]
"""What it means that a tool raises, or takes too long: ``fail`` ends the branch, which is counted and gets no reward;
with ``answer`` the policy reads what happened, and goes on."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


class Tool:
    """A function that a policy may call.  Calling the object calls the function.

    Attributes:
        function: the user's.
        name: as the policy calls it.
        schema: name, description and parameters.
        is_async: the function is awaited; a plain one runs in a thread.
        read_only: its recorded answers are used in a replay; it is not run again.
        timeout_s: of one call; None for the task's own.
        max_tokens: of one answer; longer ones are cut, with a notice.
        on_error: what any exception but ``ToolError`` means.
        on_timeout: what a call past its limit means.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        read_only: bool = False,
        timeout_s: float | None = None,
        max_tokens: int = MAX_TOKENS,
        on_error: AtFault = "fail",
        on_timeout: AtFault = "fail",
    ) -> None:
        self.function = function
        self.name = _name(function, name)
        self.is_async = is_async(function)
        self.read_only, self.timeout_s, self.max_tokens = read_only, timeout_s, max_tokens
        self.on_error: AtFault = on_error
        self.on_timeout: AtFault = on_timeout
        self._check(description)
        self.arguments = Arguments(self.name, function)
        if read_only and "Info" in {kind.__name__ for kind in self.arguments.given.values()}:
            raise ConfigError(
                f"tool {self.name!r}: read_only=True, but it takes the episode's Info, which a replay without it would "
                "leave as it was; leave one of both away"
            )
        text = described(function).summary if description is None else description
        self.schema: ToolSchema = {
            "name": self.name,
            "description": text,
            "parameters": self.arguments.schema,
        }
        functools.update_wrapper(self, function, updated=())

    def _check(self, description: str | None) -> None:
        who = f"tool {self.name!r}"
        for field, value in (("timeout_s", self.timeout_s), ("max_tokens", self.max_tokens)):
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
            if not is_number and not (value is None and field == "timeout_s"):
                raise ConfigError(f"{who}: {field} is {of_value(value)}; expected a number above 0")
        for field, at_fault in (("on_error", self.on_error), ("on_timeout", self.on_timeout)):
            if at_fault not in get_args(AtFault):
                raise ConfigError(f"{who}: {field} is {of_value(at_fault)}; expected 'fail' or 'answer'")
        if not isinstance(self.read_only, bool):
            raise ConfigError(f"{who}: read_only is {of_value(self.read_only)}; expected True or False")
        if description is not None and not isinstance(description, str):
            raise ConfigError(f"{who}: description is {of_value(description)}; expected a text")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns; for tests of it."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<tool {self.name}>"


OPTIONS = tuple(p.name for p in inspect.signature(Tool).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY)


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    read_only: bool = False,
    timeout_s: float | None = None,
    max_tokens: int = MAX_TOKENS,
    on_error: AtFault = "fail",
    on_timeout: AtFault = "fail",
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(function: Callable[..., Any] | None = None, /, **options: Any) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Makes a function a tool, as ``@tool`` or ``@tool(read_only=True, …)``.

    Args:
        function: plain (it runs in a thread of its own) or async.  Every parameter has an annotation.  The first
            paragraph of its docstring describes the tool, its list of arguments describes them.
        options: as of ``Tool``.

    Raises:
        ConfigError: naming the tool and the parameter or option at fault.
    """
    if function is None:
        return lambda later: _made(later, options)
    return _made(function, options)


def _made(function: Any, options: dict[str, Any]) -> Tool:
    if not callable(function):
        raise ConfigError(
            f"@tool was given {of_value(function)} ({of_type(function)}), which is no function; options are given by "
            "keyword: @tool(read_only=True)"
        )
    if unknown := [option for option in options if option not in OPTIONS]:
        raise ConfigError(
            f"@tool of {getattr(function, '__name__', function)!r} has no option {unknown[0]!r}; options: "
            f"{', '.join(OPTIONS)}"
        )
    return Tool(function, **options)


def as_tools(found: Any) -> tuple[Tool, ...]:
    """The tools of a task; plain functions become tools.  Raises ConfigError."""
    if isinstance(found, str | dict | Tool) or not isinstance(found, Sequence):
        raise ConfigError(
            f"tools is {of_value(found)} ({of_type(found)}); expected a list of functions: tools=[lookup]"
        )
    tools: dict[str, Tool] = {}
    for at, one in enumerate(found):
        if inspect.isclass(one) or not callable(one):
            raise ConfigError(
                f"tools[{at}] is {of_value(one)} ({of_type(one)}); expected a function with @tool above it"
                + ("; its result stands there: leave the () away" if isinstance(one, str | int | float) else "")
            )
        made = one if isinstance(one, Tool) else tool(one)
        if made.name in tools:
            raise ConfigError(f"tools: two tools are called {made.name!r}; give one another name: @tool(name='…')")
        tools[made.name] = made
    return tuple(tools.values())


def _name(function: Callable[..., Any], given: str | None) -> str:
    found = getattr(function, "__name__", type(function).__name__) if given is None else given
    if not isinstance(found, str) or not _NAME.fullmatch(found):
        shown = "a lambda" if found == "<lambda>" else of_value(found)
        raise ConfigError(
            f"@tool: the tool's name is {shown}; expected letters, digits, _ and -, at most 64: write a function with "
            "def, or give @tool(name='…')"
        )
    return found
