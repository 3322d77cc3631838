"""Environments: the protocol, the checks of what they return, and the built-in ones, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.lazily import loaded_from

if TYPE_CHECKING:
    from atpo_async.environments.messages.task import MessageTask as MessageTask
    from atpo_async.environments.messages.types import MessageEpisode as MessageEpisode
    from atpo_async.environments.messages.types import Reply as Reply
    from atpo_async.environments.tools.arguments import Info as Info
    from atpo_async.environments.tools.arguments import Row as Row
    from atpo_async.environments.tools.faults import ToolError as ToolError
    from atpo_async.environments.tools.task import ToolTask as ToolTask
    from atpo_async.environments.tools.tool import tool as tool

_FROM = {
    "Info": "atpo_async.environments.tools.arguments",
    "MessageEpisode": "atpo_async.environments.messages.types",
    "MessageTask": "atpo_async.environments.messages.task",
    "Reply": "atpo_async.environments.messages.types",
    "Row": "atpo_async.environments.tools.arguments",
    "ToolError": "atpo_async.environments.tools.faults",
    "ToolTask": "atpo_async.environments.tools.task",
    "tool": "atpo_async.environments.tools.tool",
}
"""What a user's task imports from here -> its module, which is loaded when it is asked for."""

__getattr__ = loaded_from(_FROM, package=__name__)
