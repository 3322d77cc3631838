"""Answers the tool calls of an action: all at once, in order, each checked, limited and counted."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atpo_async.core.errors import EnvironmentBroken
from atpo_async.core.texts import of_error, of_type, of_value, shortened
from atpo_async.environments.messages.types import Message, ToolCall
from atpo_async.environments.tools import running
from atpo_async.environments.tools.arguments import ArgumentsRefused, Info, Row
from atpo_async.environments.tools.counts import Counts
from atpo_async.environments.tools.faults import TIMEOUT, ToolError, ToolFailed
from atpo_async.environments.tools.output import Cut, shown, text_of
from atpo_async.environments.tools.tool import Tool

MAX_CALLS = 16
"""Of one action; further ones are answered with an error."""

MOST_ERROR = 400
"""Characters of an error that the policy reads."""

MOST_ERROR_TOKENS = 100
"""And tokens, which are as many as characters in a small vocabulary: what a policy does wrong does not fill its
context, which would be taken for a fault of the tool."""


class ToolCalls:
    """The tools of one task, as the policy calls them.

    Args:
        tools: that there are.
        cut: shortens a text to so many tokens.
        counts: takes what happens, as ``tool/<name>/calls`` and so on.
        timeout_s: of a call of a tool without a limit of its own.
        error_text: what the policy reads of a call that cannot be made; ``{error}`` stands for the fault.
        max_calls: as ``MAX_CALLS``.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        cut: Cut,
        counts: Counts,
        timeout_s: float,
        error_text: str,
        max_calls: int = MAX_CALLS,
    ) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._cut, self._counts = cut, counts
        self._timeout_s, self._error_text, self._max_calls = timeout_s, error_text, max_calls
        self.only_read = all(tool.read_only for tool in tools)
        """No call changes anything outside."""

    async def answers(
        self, calls: Sequence[ToolCall], *, info: Info, row: Row, recorded: Sequence[str] | None = None
    ) -> list[Message]:
        """A message for each call, in order.

        Args:
            calls: of one action.
            info, row: of the episode, for tools that ask for them.
            recorded: in a replay, the texts that the policy was shown: tools that only read are not run again.

        Raises:
            ToolFailed: a tool failed; the other calls are cancelled.
            EnvironmentBroken: too many threads hang.
        """
        texts: list[str | None] = [None] * len(calls)
        tasks: dict[asyncio.Task[str], int] = {}
        for at, call in enumerate(calls):
            tool = self._tools.get(call.name)
            if at >= self._max_calls:
                texts[at] = self._error(f"at most {self._max_calls} calls in one message; this one was not made")
            elif recorded is not None and (tool is None or tool.read_only):
                texts[at] = recorded[at]
                if tool is not None:
                    self._counts.add(f"tool/{tool.name}/reused")
            else:
                tasks[asyncio.create_task(self._answer(call, info, row), name=f"tool {call.name[:40]}")] = at
        try:
            if tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    texts[tasks[task]] = task.result()
        finally:
            for task in tasks:
                task.cancel()
        return [
            {**message, "content": text or ""} for message, text in zip(self.blank(calls), texts, strict=True)
        ]  # fmt: skip

    @staticmethod
    def blank(calls: Sequence[ToolCall]) -> list[Message]:
        """The answers to ``calls`` without their content."""
        return [{"role": "tool", "tool_call_id": call.id, "name": call.name or "unknown"} for call in calls]

    async def _answer(self, call: ToolCall, info: Info, row: Row) -> str:
        tool = self._tools.get(call.name)
        if call.fault:
            self._counts.add("tool/malformed")
            return self._error(f"the call could not be read: {call.fault}")
        if tool is None:
            self._counts.add("tool/unknown")
            known = ", ".join(self._tools) or "none"
            return self._error(f"there is no tool {shortened(call.name, 60)!r}; tools: {known}")
        self._counts.add(f"tool/{tool.name}/calls")
        try:
            arguments = tool.arguments.read(call.arguments)
        except ArgumentsRefused as refused:
            return self._refused(tool, str(refused))
        given = {name: info if kind is Info else copy.deepcopy(row) for name, kind in tool.arguments.given.items()}
        return await self._made(tool, call, {**arguments, **given})

    async def _made(self, tool: Tool, call: ToolCall, arguments: Mapping[str, Any]) -> str:
        limit_s = self._timeout_s if tool.timeout_s is None else tool.timeout_s
        what, began = f"tool {tool.name!r}", time.monotonic()
        try:
            text = await running.run(
                _in_text(tool), arguments, is_async=tool.is_async, limit_s=limit_s, what=what
            )  # fmt: skip
        except ToolError as exc:
            return self._refused(tool, str(exc))
        except running.TookTooLong as late:
            self._counts.add(f"tool/{tool.name}/timeouts")
            if tool.on_timeout == "answer":
                return self._refused(tool, f"no answer within {limit_s:g} s")
            self._counts.add(f"tool/{tool.name}/failed")
            raise ToolFailed(
                f"{what} with {of_value(call.arguments)} took over {limit_s:g} s (timeout_s){late.advice}",
                kind=f"timeout of {what}", reason=TIMEOUT,
            ) from None  # fmt: skip
        except EnvironmentBroken:
            raise
        except ToolFailed:
            self._counts.add(f"tool/{tool.name}/failed")
            raise
        except Exception as exc:
            if tool.on_error == "answer":
                return self._refused(tool, of_error(exc))
            self._counts.add(f"tool/{tool.name}/failed")
            raise ToolFailed(
                f"{what} with {of_value(call.arguments)} raised {of_error(exc)}", kind=f"{of_type(exc)} in {what}"
            ) from exc
        finally:
            self._counts.add(f"tool/{tool.name}/seconds", time.monotonic() - began)
        text, was_cut = shown(text, tool.max_tokens, self._cut)
        if was_cut:
            self._counts.add(f"tool/{tool.name}/cut")
        return text

    def _refused(self, tool: Tool, fault: str) -> str:
        """The policy's own fault, or one that the tool tells it: it may try again."""
        self._counts.add(f"tool/{tool.name}/errors")
        return self._error(f"{tool.name}: {fault}")

    def _error(self, fault: str) -> str:
        text = self._cut(shortened(fault, MOST_ERROR), MOST_ERROR_TOKENS, "…")
        return self._error_text.replace("{error}", text)


def _in_text(tool: Tool) -> Callable[..., Any]:
    """The tool's function, its value as a text: a plain function's is made in its thread, as a large one takes long."""

    async def awaited(**arguments: Any) -> str:
        return text_of(await tool.function(**arguments), tool.name)

    def called(**arguments: Any) -> str:
        return text_of(tool.function(**arguments), tool.name)

    return awaited if tool.is_async else called
