"""How a tool reports to the policy, and how a tool or a reward that failed ends its branch."""

from __future__ import annotations

from typing import Final, Literal


class ToolError(Exception):
    """Raised by a tool: its text is the answer that the policy reads."""


FAILED: Final = "environment_failed"
TIMEOUT: Final = "environment_timeout"


class ToolFailed(Exception):
    """A tool or a reward failed, and its branch ends.

    Attributes:
        kind: what failures with one cause have in common.
        reason: the counter that the branch goes to (``actor/failed/<reason>``).
    """

    def __init__(
        self, text: str, *, kind: str, reason: Literal["environment_failed", "environment_timeout"] = FAILED
    ) -> None:
        super().__init__(text)
        self.kind = kind
        self.reason: Literal["environment_failed", "environment_timeout"] = reason

    def at(self, where: str) -> ToolFailed:
        """The same, with the task and its row."""
        return ToolFailed(f"{where}: {self}", kind=self.kind, reason=self.reason)
