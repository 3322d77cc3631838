"""Reports to the user of faults with which the run goes on: the first of a kind, then counts, ever more rarely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from actors.faults.fault import ENGINE_FAILED, Fault
from atpo_async.ops import notices

Notify = Callable[[str, str], None]
"""(a line for the user's terminal, the key that lines of other processes with the same content have)."""

Clock = Callable[[], float]
"""Seconds, monotonic."""

REPEAT_S = 60.0
"""After this, and then each time twice as late, the count of a known fault is reported again."""

MOST_KINDS = 50
"""Kinds of faults that are reported one by one; what comes after them is in the metrics and in the log."""

CUT_SHARE = 1 / 3
CUT_LOOKED_AT = 200
"""Actions in a row that the share is taken of."""


@dataclass(slots=True)
class _Reported:
    """A kind of fault that was reported to the user."""

    again_at: float
    chains: int
    """That had ended when it was last reported."""
    count: int = 0
    """Faults since then."""
    wait_s: float = REPEAT_S


class FaultNotices:
    """Reports the faults of one split's trees.

    Args:
        environment: ``environment.name``, for the texts.
        notify: takes each line.
        clock: seconds, monotonic.
    """

    def __init__(self, environment: str, *, notify: Notify, clock: Clock) -> None:
        self._environment = environment
        self._notify = notify
        self._clock = clock
        self._reported: dict[str, _Reported] = {}

    def add(self, fault: Fault, *, chains: int) -> None:
        """One more fault, when ``chains`` have ended so far."""
        now = self._clock()
        known = self._reported.get(fault.kind)
        if known is None:
            if len(self._reported) >= MOST_KINDS:
                return
            self._reported[fault.kind] = _Reported(now + REPEAT_S, chains=chains)
            self._notify(f"a branch failed and is left out, the run goes on: {self._named(fault)}", fault.kind)
            return
        known.count += 1
        if now < known.again_at:
            return
        of = chains - known.chains
        self._notify(f"{known.count} more of {of} branches failed like that: {self._named(fault)}", fault.kind)
        known.wait_s *= 2
        known.again_at = now + known.wait_s
        known.count, known.chains = 0, chains

    def _named(self, fault: Fault) -> str:
        if fault.source:
            return f"{fault.source}: {fault.detail}"
        mine = fault.reason not in ENGINE_FAILED and self._environment not in fault.detail
        return f"environment {self._environment!r}, {fault.detail}" if mine else fault.detail


class CutActions:
    """Reports it when many actions end because they are too long: usually the stop ids are not the model's.

    Args:
        max_action_tokens: ``search.max_action_tokens``, for the text.
        notify: takes the line.
    """

    def __init__(self, max_action_tokens: int, *, notify: Notify = notices.post) -> None:
        self._max_tokens = max_action_tokens
        self._notify = notify
        self._actions = self._cut = 0
        self._reported = False

    def count(self, actions: int, cut: int) -> None:
        """``cut`` of some more ``actions`` were ended by their length."""
        self._actions += actions
        self._cut += cut
        if self._actions < CUT_LOOKED_AT:
            return
        share = self._cut / self._actions
        if share > CUT_SHARE and not self._reported:
            self._notify(
                f"{share:.0%} of {self._actions} actions were cut off at their longest (actions/cut_share; "
                f"search.max_action_tokens = {self._max_tokens}) and not ended by a stop token: are the environment's "
                "stop_token_ids those that the policy ends its turns with?",
                "actions/cut_share",
            )
        self._reported = share > CUT_SHARE
        self._actions = self._cut = 0
