"""Decides when refused weights end the run: after the same refusal, several times in a row."""

from __future__ import annotations

import re

from atpo_async.core.errors import AtpoError, ProbeMismatch

MAX_REFUSALS = 3
"""So many equal refusals in a row are no accident, and end the run."""


NUMBERS = r"(?<![\w.])([-+]?\d[\d.]*(e[-+]?\d+)?|nan|inf)\b"
"""Numbers in a message, but not those in the names of tensors."""


class Refusals:
    """Counts how often in a row weights were not loaded for the same reason."""

    def __init__(self) -> None:
        self._reason = ""
        self._count = 0

    def add(self, error: AtpoError) -> None:
        """Raises ``error``, with the way out, at the ``MAX_REFUSALS``-th time."""
        # The same refusal at another version, or by another number of nats, has the same reason.
        numbers = NUMBERS if isinstance(error, ProbeMismatch) else r"version -?\d+"
        reason = re.sub(numbers, "", str(error))
        self._count = self._count + 1 if reason == self._reason else 1
        self._reason = reason
        if self._count >= MAX_REFUSALS:
            raise type(error)(
                f"{error} ({self._count} times in a row; is model.path of this actor the learner's model, and the "
                "memory of this machine sound?)"
            ) from error

    def over(self) -> None:
        """Weights were loaded."""
        self._reason, self._count = "", 0
