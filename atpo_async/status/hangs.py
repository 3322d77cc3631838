"""Who is stuck, and who waits for whom because of it.  Pure: pictures, process facts and the time come in.

A role is *stuck* when something in it stands still that nobody but the role itself could move:

- it is stopped by a signal;
- it gives no sign of life: not even its status thread, which needs the interpreter only;
- its event loop does not tick;
- it waits for a part of its own (``waits.OWN_PARTS``): its torch thread, its engine, its environment;
- it cannot come to its end, or has not given its first picture.

A role that waits for another one is never stuck, however long it waits; neither is one that works.  Work shows as
progress, and progress sets the clock back: a counter of ``waits.progress`` (turns, tokens, micro-batches, batches, …),
a change of phase, coming back to life, and while a role is starting (loading, compiling, warming up) computing and
reading worth mentioning.  A wait with a limit of its own is left to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from atpo_async.status.snapshot import ENDED, ENDING, StatusSnapshot, Wait, duration
from atpo_async.status.waits import DISK, OWN_PARTS

SILENT_S = 5.0
"""A picture that has not been renewed for so long: the status thread, which writes one a second, does not run."""

WORK_S = 3.0
"""What has lasted for less is called work by who has one picture only; a whole ``Watch`` knows better."""

LIMIT_SLACK_S = 5.0
"""What ends by itself after its limit has this much longer to do so."""

BUSY_SHARE, BUSY_MB_S = 0.05, 0.5
"""Of one core, or read and written: a starting role that does as much is at work.  Beats and pictures alone take less
than a hundredth of it."""

CLOSED = "which closes the circle"

BUFFER, LEARNER = "buffer", "learner"
ACTORS = "actors"
"""All actors, as what a wait is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedRole:
    """One role that should run, as it is seen from outside."""

    role: str
    pictures: tuple[StatusSnapshot, ...]
    """Of this attempt's processes: one, or one for each rank; none yet."""
    stopped: tuple[int, ...] = ()
    """Those of its own processes (its first one, and those that give pictures) that a signal has stopped.  What an
    environment does with its children is its business."""
    processor_s: float = 0.0
    moved_mb: float = 0.0
    """Used, and read and written, by all its processes so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """A role that cannot go on."""

    role: str
    for_s: float
    why: str
    """Goes on after "learner, which …"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is to be done about what was seen."""

    line: str
    """For the user: who waits for whom, to the end."""
    ends: str | None = None
    """The role to be started again; None: to be told only."""
    why: str = ""


# --- looking on -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Memory:
    """What is remembered of a role between two looks."""

    attempt: str
    moved_at: float
    done: object = None
    sequences: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Process -> (number of its last picture, when that was first seen)."""
    stopped_at: float | None = None
    work: tuple[float, float, float] | None = None
    """(processor seconds used, megabytes moved, when)."""
    was_silent: bool = False
    told_s: float = 0.0


class Watch:
    """Looks at a run again and again.

    Args:
        deadline_s: a role stuck for longer, or a run in which nothing moves, is told.
        hang_s: a role stuck for longer is to be started again.
        every_s: between two looks; where far more time has passed, the watcher itself stood still (a machine that
            slept, a stopped supervisor) and every clock starts anew.
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
        sights: Sequence[ObservedRole],
        now: float,
        *,
        others: Iterable[StatusSnapshot] = (),
        restarts: Mapping[str, float] | None = None,
    ) -> list[Verdict]:
        """What has to be told or done now.

        Args:
            sights: the roles that are looked after.
            now: seconds, monotonic.
            others: pictures of roles that somebody else looks after (actors that joined by hand).
            restarts: roles that have ended and are to be started again -> seconds until then.
        """
        if self._looked_at is None or now - self._looked_at > self._gap_s:
            self._roles.clear()
        self._looked_at = now
        for gone in self._roles.keys() - {sight.role for sight in sights}:
            del self._roles[gone]
        stuck = {s.role: s for sight in sights if (s := self._look_at(sight, now)) is not None}
        pictures = by_role([p for sight in sights for p in sight.pictures] + list(others))
        known = _known(pictures, restarts or {})
        verdicts = []
        for found in stuck.values():
            memory = self._roles[found.role]
            line = "; ".join(explain(pictures, stuck, only=found.role, known=known))
            if found.for_s >= self._hang_s:
                memory.moved_at = now  # it is being ended; should it outlive that, it is told again
                verdicts.append(Verdict(line=line, ends=found.role, why=found.why))
            elif found.for_s >= self._deadline_s and found.for_s >= 2 * memory.told_s:
                memory.told_s = found.for_s
                verdicts.append(Verdict(line=line))
        if not stuck and pictures and self._roles:
            still_s = now - max(memory.moved_at for memory in self._roles.values())
            if still_s < self._deadline_s:
                self._still_told_s = 0.0
            elif still_s >= 2 * self._still_told_s and (told := explain(pictures, {}, known=known)):
                self._still_told_s = still_s
                verdicts.append(Verdict(line=f"{_still(still_s, restarts or {})}: {'; '.join(told)}"))
        return verdicts

    def _look_at(self, sight: ObservedRole, now: float) -> Stuck | None:
        attempt = sight.pictures[0].mark if sight.pictures else ""
        memory = self._roles.get(sight.role)
        if memory is None or (attempt and memory.attempt and attempt != memory.attempt):
            memory = self._roles[sight.role] = _Memory(attempt, now)
        memory.attempt = memory.attempt or attempt
        silent_s = self._renewed(memory, sight, now)
        done = [(p.progress, p.phase, p.starting) for p in sight.pictures]
        if done != memory.done:
            memory.done, memory.moved_at = done, now
        self._work_at_start(memory, sight, now)
        if not sight.stopped:
            memory.stopped_at = None
        elif memory.stopped_at is None:
            memory.stopped_at = now
        still_s = now - memory.moved_at
        found = list(_causes(sight, still_s=still_s, silent_s=silent_s))
        if memory.stopped_at is not None:
            found = [(now - memory.stopped_at, stopped_words(sight.stopped))]
        # What was silent or stopped could not make progress: when it is back its time begins anew.
        silent = bool(found) and (memory.stopped_at is not None or silent_s > SILENT_S)
        if memory.was_silent and not silent:
            memory.moved_at = now
            found = []
        memory.was_silent = silent
        if not found:
            memory.told_s = 0.0
            return None
        for_s, why = max(found)
        return Stuck(role=sight.role, for_s=for_s, why=why)

    @staticmethod
    def _renewed(memory: _Memory, sight: ObservedRole, now: float) -> float:
        """For how long the longest silent of the role's processes has given no new picture."""
        for picture in sight.pictures:
            known = memory.sequences.get(picture.role)
            if known is None or known[0] != picture.sequence:
                memory.sequences[picture.role] = (picture.sequence, now)
        return max((now - memory.sequences[p.role][1] for p in sight.pictures), default=0.0)

    def _work_at_start(self, memory: _Memory, sight: ObservedRole, now: float) -> None:
        """While a role is starting, computing is progress, and so is reading."""
        if memory.work is None:
            memory.work = (sight.processor_s, sight.moved_mb, now)
            return
        processor_s, moved_mb, before = memory.work
        passed_s = now - before
        if passed_s < self._window_s:
            return
        memory.work = (sight.processor_s, sight.moved_mb, now)
        busy = (
            sight.processor_s - processor_s > BUSY_SHARE * passed_s or sight.moved_mb - moved_mb > BUSY_MB_S * passed_s
        )
        if busy and (not sight.pictures or any(picture.starting for picture in sight.pictures)):
            memory.moved_at = now


def _known(pictures: Mapping[str, StatusSnapshot], restarts: Mapping[str, float]) -> dict[str, str]:
    """What is known of roles without a picture."""
    joined = joined_by_address(pictures.values())
    known = {name: f"joined by address (heard {duration(silent_s)} ago)" for name, silent_s in joined.items()}
    known |= {role: f"is started again in {duration(left_s)}" for role, left_s in restarts.items()}
    return {role: words for role, words in known.items() if role not in pictures}


def _still(still_s: float, restarts: Mapping[str, float]) -> str:
    """The beginning of the line about a run that stands still while nobody in it is stuck."""
    if not restarts:
        return f"nothing has moved for {duration(still_s)}, though no role is stuck"
    ended = " and ".join(f"{role} again in {duration(left_s)}" for role, left_s in restarts.items())
    return f"nothing has moved for {duration(still_s)}; the supervisor starts {ended}"


def _causes(sight: ObservedRole, *, still_s: float, silent_s: float) -> Iterator[tuple[float, str]]:
    """(seconds, why) of all that stands still in a role."""
    if not sight.pictures:
        yield still_s, f"has not begun to work for {duration(still_s)}, and neither computes nor reads"
    elif silent_s > SILENT_S:
        for_s = min(silent_s, still_s)
        yield for_s, f"has given no sign of life for {duration(silent_s)}: nothing of its interpreter runs"
        return
    for picture in sight.pictures:
        if picture.held_up:
            age_s = picture.loop_age_s or 0.0
            where = f", in {picture.stack[-1]}" if picture.stack else ""
            yield min(age_s, still_s), f"stands still: its loop last ran {duration(age_s)} ago{where}"
        if picture.phase == ENDING:
            yield min(picture.phase_s, still_s), f"has not come to its end for {duration(picture.phase_s)}"
        for wait in picture.waits:
            if wait.on in OWN_PARTS and (wait.limit_s is None or wait.since_s > wait.limit_s + LIMIT_SLACK_S):
                yield min(wait.since_s, still_s), _own_part(wait)


def stuck_now(picture: StatusSnapshot, *, stopped: bool, silent_s: float) -> Stuck | None:
    """Of one picture alone, without a history: what ``atpo status`` has."""
    if stopped:
        return Stuck(role=picture.role, for_s=silent_s, why=stopped_words((picture.pid,)))
    if picture.starting and silent_s <= SILENT_S:
        # Whether what it loads or compiles gets on shows in what it computes and reads: only a ``Watch`` sees that.
        return None
    sight = ObservedRole(role=picture.role, pictures=(picture,))
    found = [
        cause for cause in _causes(sight, still_s=picture.still_s + silent_s, silent_s=silent_s) if cause[0] > WORK_S
    ]
    if not found:
        return None
    for_s, why = max(found)
    return Stuck(role=picture.role, for_s=for_s, why=why)


def stopped_words(pids: Sequence[int]) -> str:
    """What is said of processes that a signal has stopped, with the way out."""
    named = " ".join(map(str, pids))
    return f"is stopped by a signal (kill -CONT {named} lets it go on)"


def _own_part(wait: Wait) -> str:
    # The role itself need not be named again; a part of it is.
    whose = "" if wait.who.startswith(("actor ", "the learner", "the buffer")) else f"{wait.who}, "
    return f"has been at {wait.what} for {duration(wait.since_s)} ({whose}its {wait.on})"


# --- who waits for whom -----------------------------------------------------------------------------------------


def by_role(pictures: Iterable[StatusSnapshot]) -> dict[str, StatusSnapshot]:
    """The newest picture of each name; those of roles that have ended are left out."""
    found: dict[str, StatusSnapshot] = {}
    for picture in pictures:
        if picture.phase == ENDED:
            continue
        known = found.get(picture.role)
        if known is None or known.at < picture.at:
            found[picture.role] = picture
    return found


def waits_of(picture: StatusSnapshot) -> list[Wait]:
    """Its waits for roles and for parts of its own, the longest first.

    What a link waits for counts where nobody has said why: of a peer that no wait names.
    """
    found = list(picture.waits)
    named = {wait.on for wait in found}
    for facts in picture.links.values():
        peer = facts.get("peer")
        if peer in named:
            continue
        said = facts.get("waits")
        for wait in said if isinstance(said, Sequence) else ():
            if isinstance(peer, str) and isinstance(wait, Mapping):
                try:
                    since_s = float(wait["since_s"])
                    what = str(wait["what"]).replace(" waits for ", ": ")
                except (KeyError, TypeError, ValueError):
                    continue
                found.append(Wait(who=picture.role, what=what, on=peer, since_s=since_s))
    return sorted((wait for wait in found if wait.on), key=lambda wait: -wait.since_s)


@dataclass(frozen=True, slots=True)
class _Chain:
    """Roles along their waits, the words about each, and how long each wait has lasted."""

    names: tuple[str, ...]
    words: tuple[str, ...]
    ages_s: tuple[float, ...] = ()

    @property
    def closes(self) -> bool:
        return self.words[-1] == CLOSED

    @property
    def end(self) -> str | frozenset[str]:
        """What all chains that come to the same end have in common: its last role, or the members of its circle."""
        return frozenset(self.names[self.names.index(self.names[-1]) :]) if self.closes else self.names[-1]

    def after(self, name: str, words: str, age_s: float) -> _Chain:
        """This chain with one more wait at its beginning."""
        return _Chain((name, *self.names), (words, *self.words), (age_s, *self.ages_s))


def explain(
    pictures: Mapping[str, StatusSnapshot],
    stuck: Mapping[str, Stuck],
    *,
    only: str | None = None,
    known: Mapping[str, str] | None = None,
    circle_s: float = 0.0,
) -> list[str]:
    """Sentences "X waits for Y, which waits for Z, which …", one for each end that waiting comes to.

    Args:
        pictures: role -> picture.
        stuck: role -> why it is stuck, of those that are.
        only: the chains that end with this role; at least one sentence, for the role alone if nobody waits for it.
        known: role -> what is known of one without a picture; goes on after "X, which …".
        circle_s: a circle one of whose waits is younger is no deadlock yet: it is left out.
    """
    chains = [_chain(role, pictures, stuck, known or {}) for role in pictures if waits_of(pictures[role])]
    best: dict[str | frozenset[str], _Chain] = {}
    for chain in chains:
        end = chain.end
        if len(chain.names) < 2 or (only is not None and end != only):
            continue
        if chain.closes and min(chain.ages_s) < circle_s:
            continue
        if end not in best or len(chain.words) > len(best[end].words):
            best[end] = chain
    said = [", ".join(chain.words) for chain in best.values()]
    said += [f"{role} {found.why}" for role, found in stuck.items() if role not in best and only in (None, role)]
    return said


def _chain(
    start: str,
    pictures: Mapping[str, StatusSnapshot],
    stuck: Mapping[str, Stuck],
    known: Mapping[str, str],
    before: tuple[str, ...] = (),
) -> _Chain:
    """From ``start`` on.  Of several ways on, one that does not come back to where it has been: a circle that has a way
    out holds up nobody."""
    subject = "which" if before else start
    if start in stuck:
        return _Chain((start,), (f"{subject} {stuck[start].why}",))
    picture = pictures.get(start)
    if picture is None:
        words = f"{subject} {known[start]}" if start in known else "of which nothing is known here"
        return _Chain((start,), (words,))
    found = waits_of(picture)
    own = [wait for wait in found if wait.on in OWN_PARTS]
    if own:  # a role that works is not held up by others
        at = f"{own[0].what} ({own[0].on}, {duration(own[0].since_s)})"
        return _Chain((start,), (f"{subject} is at work: {at}",))
    circle: _Chain | None = None
    path = (*before, start)
    for wait, target in _ways(found, pictures, stuck, known):
        if target == start:
            continue
        words = f"{subject} waits {duration(wait.since_s)} for {wait.what} from {target}"
        if target == ACTORS:
            rest = _Chain((target,), ("of which none is there",))
        elif target == DISK:
            return _Chain((start, target), (words,), (wait.since_s,))
        elif target in path:
            rest = _Chain((target,), (CLOSED,))
        else:
            rest = _chain(target, pictures, stuck, known, path)
        chain = rest.after(start, words, wait.since_s)
        if not chain.closes:
            return chain
        circle = circle or chain
    return circle or _Chain((start,), (f"{subject} is {picture.phase}, and waits for no other role",))


def _ways(
    found: Sequence[Wait], pictures: Mapping[str, StatusSnapshot], stuck: Mapping[str, Stuck], known: Mapping[str, str]
) -> list[tuple[Wait, str]]:
    """Each wait with each role that could end it; the stuck first, then as long as they have lasted."""
    ways = []
    for wait in found:
        if wait.on == ACTORS:
            targets = [role for role in (*pictures, *known) if role.startswith("actor")] or [ACTORS]
        else:
            targets = [wait.on]
        ways += [(wait, target) for target in targets]
    return sorted(ways, key=lambda way: (way[1] not in stuck, -way[0].since_s))


def joined_by_address(pictures: Iterable[StatusSnapshot]) -> dict[str, float]:
    """Actors without a status file here, which joined by address: name -> seconds since the buffer heard of them."""
    pictures = list(pictures)
    found: dict[str, float] = {}
    for picture in pictures:
        for facts in picture.links.values() if picture.role == BUFFER else ():
            peers = facts.get("peers")
            for peer in peers if isinstance(peers, Sequence) else ():
                try:
                    name, silent_s = str(peer["peer"]), float(peer["silent_s"])
                except (KeyError, TypeError, ValueError):
                    continue
                if name.partition("-")[0] != LEARNER:
                    found[name] = silent_s
    return {name: silent_s for name, silent_s in found.items() if name not in {p.role for p in pictures}}
