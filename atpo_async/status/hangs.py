"""Decides which roles are stuck, from their status snapshots, what their processes use, and the time.  Pure.

A role is *stuck* when a part of it stands still that no other role could move:

- it is stopped by a signal;
- it gives no sign of life: not even its status thread, which needs the interpreter only;
- its event loop does not tick;
- it waits for a part of its own (``waits.OWN_PARTS``): its torch thread, its engine, its environment;
- it does not come to its end, or has not written its first status.

A role that waits for another one is never stuck, however long it waits; neither is one that works.  Work shows as
progress, and progress sets the clock back: a counter of ``waits.progress`` (turns, tokens, micro-batches, batches, …),
a change of phase, coming back to life, and while a role is starting (loading, compiling, warming up) computing and
reading worth mentioning.  A wait with a limit of its own is not judged before that limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from atpo_async.status.chains import Stuck, by_role, explain, joined_by_address
from atpo_async.status.snapshot import ENDING, StatusSnapshot, Wait
from atpo_async.status.waits import OWN_PARTS
from atpo_async.status.wording import duration

SILENT_S = 5.0
"""Past this age of its snapshot a role counts as silent: its status thread, which writes one a second, does not run."""

WORK_S = 3.0
"""What has lasted for less counts as work where only one snapshot is known; a ``Watch`` has a history to judge by."""

LIMIT_SLACK_S = 5.0
"""A wait that is past its own limit has this much longer to end by itself."""

BUSY_SHARE, BUSY_MB_S = 0.05, 0.5
"""Of one core, or read and written: a starting role that does as much is at work.  Heartbeats and status files alone
take less than a hundredth of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedRole:
    """One role that should run, as it is seen from outside."""

    role: str
    statuses: tuple[StatusSnapshot, ...]
    """Of this attempt's processes: one, or one for each rank; none yet."""
    stopped: tuple[int, ...] = ()
    """The role's own processes (its first one, and those that write a status) that a signal has stopped; not those that
    an environment has started."""
    usage_known: bool = True
    """False where its launcher cannot tell what its processes use."""
    processor_s: float = 0.0
    moved_mb: float = 0.0
    """Processor seconds used, and megabytes read and written, by all its processes so far."""


class WorkMeter:
    """Whether a role computes, or reads and writes, more than its status thread alone does.

    Args:
        window_s: over which that is measured, at least.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._last: tuple[float, ObservedRole] | None = None

    def is_busy(self, observed: ObservedRole, now: float) -> bool:
        """Whether it was, since the last window ended; False where none has ended.

        Where nothing is known of its processes, a role counts as busy that has no status yet or renews it.
        """
        if self._last is None:
            self._last = now, observed
        before, last = self._last
        passed_s = now - before
        if passed_s < self._window_s:
            return False
        self._last = now, observed
        if not observed.usage_known:
            return not observed.statuses or _numbers(observed) != _numbers(last)
        computed_s, moved_mb = observed.processor_s - last.processor_s, observed.moved_mb - last.moved_mb
        return computed_s > BUSY_SHARE * passed_s or moved_mb > BUSY_MB_S * passed_s


def _numbers(observed: ObservedRole) -> list[int]:
    return [status.sequence for status in observed.statuses]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the supervisor should report or do about a role."""

    line: str
    """For the user: the chain of waits, to its end."""
    ends: str | None = None
    """The role to be ended and started again; None: the line is only reported."""
    why: str = ""


# --- watching ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Memory:
    """What a ``Watch`` remembers of a role between two looks."""

    attempt: str
    """The mark of the attempt that was seen last."""
    moved_at: float
    """When there was progress last."""
    work: WorkMeter
    done: object = None
    sequences: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Process -> (number of its last snapshot, when that was first seen)."""
    stopped_at: float | None = None
    was_silent: bool = False
    told_s: float = 0.0


class Watch:
    """Judges the roles of a run, look after look.

    Args:
        deadline_s: a role that is stuck for longer is reported, and so is a run in which nothing has moved for longer.
        hang_s: a role that is stuck for longer is to be started again.
        every_s: between two looks; where far more time has passed, the supervisor itself stood still (a machine that
            slept, a signal), and every clock starts anew.
    """

    def __init__(self, *, deadline_s: float, hang_s: float, every_s: float) -> None:
        self._deadline_s = deadline_s
        self._hang_s = hang_s
        self._gap_s = max(5.0, 5 * every_s)
        self._window_s = min(1.0, hang_s / 4)
        self._looked_at: float | None = None
        self._roles: dict[str, _Memory] = {}
        self._still_told_s = 0.0

    def look(
        self,
        observed_roles: Sequence[ObservedRole],
        now: float,
        *,
        others: Iterable[StatusSnapshot] = (),
        restarts: Mapping[str, float] | None = None,
    ) -> list[Verdict]:
        """What has to be reported or done now.

        Args:
            observed_roles: the roles that the supervisor started.
            now: seconds, monotonic.
            others: snapshots of roles that it did not start (actors that joined by hand).
            restarts: roles that have ended and are to be started again -> seconds until then.
        """
        if self._looked_at is None or now - self._looked_at > self._gap_s:
            self._roles.clear()
        self._looked_at = now
        for gone in self._roles.keys() - {observed.role for observed in observed_roles}:
            del self._roles[gone]
        stuck = {s.role: s for observed in observed_roles if (s := self._look_at(observed, now)) is not None}
        statuses = by_role([p for observed in observed_roles for p in observed.statuses] + list(others))
        known = _known(statuses, restarts or {})
        verdicts = []
        for found in stuck.values():
            memory = self._roles[found.role]
            line = "; ".join(explain(statuses, stuck, only=found.role, known=known))
            if found.for_s >= self._hang_s:
                memory.moved_at = now  # it is being ended; should it survive that, it is reported again
                verdicts.append(Verdict(line=line, ends=found.role, why=found.why))
            elif found.for_s >= self._deadline_s and found.for_s >= 2 * memory.told_s:
                memory.told_s = found.for_s
                verdicts.append(Verdict(line=line))
        if not stuck and statuses and self._roles:
            still_s = now - max(memory.moved_at for memory in self._roles.values())
            if still_s < self._deadline_s:
                self._still_told_s = 0.0
            elif still_s >= 2 * self._still_told_s and (told := explain(statuses, {}, known=known)):
                self._still_told_s = still_s
                verdicts.append(Verdict(line=f"{_still(still_s, restarts or {})}: {'; '.join(told)}"))
        return verdicts

    def _look_at(self, observed: ObservedRole, now: float) -> Stuck | None:
        attempt = observed.statuses[0].mark if observed.statuses else ""
        memory = self._roles.get(observed.role)
        if memory is None or (attempt and memory.attempt and attempt != memory.attempt):
            memory = self._roles[observed.role] = _Memory(attempt, now, WorkMeter(self._window_s))
        memory.attempt = memory.attempt or attempt
        silent_s = self._renewed(memory, observed, now)
        done = [(p.progress, p.phase, p.starting) for p in observed.statuses]
        if done != memory.done:
            memory.done, memory.moved_at = done, now
        starting = not observed.statuses or any(status.starting for status in observed.statuses)
        if memory.work.is_busy(observed, now) and starting:
            memory.moved_at = now
        if not observed.stopped:
            memory.stopped_at = None
        elif memory.stopped_at is None:
            memory.stopped_at = now
        still_s = now - memory.moved_at
        found = list(_causes(observed, still_s=still_s, silent_s=silent_s))
        if memory.stopped_at is not None:
            found = [(now - memory.stopped_at, stopped_words(observed.stopped))]
        # A silent or stopped role could not make progress: once it runs again, its time begins anew.
        silent = bool(found) and (memory.stopped_at is not None or silent_s > SILENT_S)
        if memory.was_silent and not silent:
            memory.moved_at = now
            found = []
        memory.was_silent = silent
        if not found:
            memory.told_s = 0.0
            return None
        for_s, why = max(found)
        return Stuck(role=observed.role, for_s=for_s, why=why)

    @staticmethod
    def _renewed(memory: _Memory, observed: ObservedRole, now: float) -> float:
        """Seconds since a snapshot was renewed, of the process of the role that has been silent for longest."""
        for status in observed.statuses:
            known = memory.sequences.get(status.role)
            if known is None or known[0] != status.sequence:
                memory.sequences[status.role] = (status.sequence, now)
        return max((now - memory.sequences[p.role][1] for p in observed.statuses), default=0.0)


def _known(statuses: Mapping[str, StatusSnapshot], restarts: Mapping[str, float]) -> dict[str, str]:
    """What is known of roles without a snapshot."""
    joined = joined_by_address(statuses.values())
    known = {name: f"joined by address (heard {duration(silent_s)} ago)" for name, silent_s in joined.items()}
    known |= {role: f"is started again in {duration(left_s)}" for role, left_s in restarts.items()}
    return {role: words for role, words in known.items() if role not in statuses}


def _still(still_s: float, restarts: Mapping[str, float]) -> str:
    """The beginning of the line about a run that stands still though no role is stuck."""
    if not restarts:
        return f"nothing has moved for {duration(still_s)}, though no role is stuck"
    ended = " and ".join(f"{role} again in {duration(left_s)}" for role, left_s in restarts.items())
    return f"nothing has moved for {duration(still_s)}; the supervisor starts {ended}"


def _causes(observed: ObservedRole, *, still_s: float, silent_s: float) -> Iterator[tuple[float, str]]:
    """(seconds, why) of all that stands still in a role."""
    if not observed.statuses:
        yield still_s, f"has not begun to work for {duration(still_s)}, and neither computes nor reads"
    elif silent_s > SILENT_S:
        for_s = min(silent_s, still_s)
        yield for_s, f"has given no sign of life for {duration(silent_s)}: nothing of its interpreter runs"
        return
    for status in observed.statuses:
        if status.held_up:
            age_s = status.loop_age_s or 0.0
            where = f", in {status.stack[-1]}" if status.stack else ""
            yield min(age_s, still_s), f"stands still: its loop last ran {duration(age_s)} ago{where}"
        if status.phase == ENDING:
            yield min(status.phase_s, still_s), f"has not come to its end for {duration(status.phase_s)}"
        for wait in status.waits:
            if wait.on in OWN_PARTS and (wait.limit_s is None or wait.since_s > wait.limit_s + LIMIT_SLACK_S):
                yield min(wait.since_s, still_s), _own_part(wait)


def stuck_now(status: StatusSnapshot, *, stopped: bool, silent_s: float) -> Stuck | None:
    """Whether a role is stuck, judged by one snapshot without a history: what ``atpo status`` has."""
    if stopped:
        return Stuck(role=status.role, for_s=silent_s, why=stopped_words((status.pid,)))
    if status.starting and silent_s <= SILENT_S:
        # Whether loading or compiling gets on shows in what it computes and reads, which only a `Watch` sees.
        return None
    observed = ObservedRole(role=status.role, statuses=(status,))
    found = [
        cause for cause in _causes(observed, still_s=status.still_s + silent_s, silent_s=silent_s) if cause[0] > WORK_S
    ]
    if not found:
        return None
    for_s, why = max(found)
    return Stuck(role=status.role, for_s=for_s, why=why)


def stopped_words(pids: Sequence[int]) -> str:
    """The words for processes that a signal has stopped, with the way out."""
    named = " ".join(map(str, pids))
    return f"is stopped by a signal (kill -CONT {named} lets it go on)"


def _own_part(wait: Wait) -> str:
    # The sentence has named the role already; a part of it is named here.
    whose = "" if wait.who.startswith(("actor ", "the learner", "the buffer")) else f"{wait.who}, "
    return f"has been at {wait.what} for {duration(wait.since_s)} ({whose}its {wait.on})"
