"""Who waits for whom: the waits of all roles followed to their ends, as sentences.  Pure.

Each chain of waits ends with a role that is stuck or at work, with the disk, or where it began: a circle, a deadlock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from atpo_async.status.snapshot import ENDED, StatusSnapshot, Wait
from atpo_async.status.waits import CLUSTER, DISK, OWN_PARTS
from atpo_async.status.wording import duration

CLOSED = "which closes the circle"

BUFFER, LEARNER = "buffer", "learner"
ACTORS = "actors"
"""All actors, as what a wait is for."""
OWN_KEY = "client"
"""How the key of a host's own roles is called (``links.keys.CLIENT_KEY``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """A role that cannot go on."""

    role: str
    for_s: float
    why: str
    """Continues the sentence "learner, which …"."""


def by_role(statuses: Iterable[StatusSnapshot]) -> dict[str, StatusSnapshot]:
    """Role -> its newest snapshot, of roles that have not ended."""
    found: dict[str, StatusSnapshot] = {}
    for status in statuses:
        if status.phase == ENDED:
            continue
        known = found.get(status.role)
        if known is None or known.at < status.at:
            found[status.role] = status
    return found


def waits_of(status: StatusSnapshot) -> list[Wait]:
    """The waits of a role for other roles and for its own parts, the longest first.

    A wait that a link reports counts only where no named wait of the role is for the same peer.
    """
    found = list(status.waits)
    named = {wait.on for wait in found}
    for facts in status.links.values():
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
                found.append(Wait(who=status.role, what=what, on=peer, since_s=since_s))
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
        """Equal for all chains that come to the same end: the last role, or the members of the circle."""
        return frozenset(self.names[self.names.index(self.names[-1]) :]) if self.closes else self.names[-1]

    def after(self, name: str, words: str, age_s: float) -> _Chain:
        """This chain with one more wait at its beginning."""
        return _Chain((name, *self.names), (words, *self.words), (age_s, *self.ages_s))


def explain(
    statuses: Mapping[str, StatusSnapshot],
    stuck: Mapping[str, Stuck],
    *,
    only: str | None = None,
    known: Mapping[str, str] | None = None,
    circle_s: float = 0.0,
) -> list[str]:
    """Sentences "X waits for Y, which waits for Z, which …", one for each end that waiting comes to.

    Args:
        statuses: role -> its status.
        stuck: role -> why it is stuck, of those that are.
        only: the chains that end with this role; at least one sentence, for the role alone if no role waits for it.
        known: role -> what is known of a role without a snapshot; continues the sentence "X, which …".
        circle_s: a circle with a wait younger than this is not yet called a deadlock, and is left out.
    """
    chains = [_chain(role, statuses, stuck, known or {}) for role in statuses if waits_of(statuses[role])]
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
    statuses: Mapping[str, StatusSnapshot],
    stuck: Mapping[str, Stuck],
    known: Mapping[str, str],
    before: tuple[str, ...] = (),
) -> _Chain:
    """The chain of waits that begins with ``start``.

    Where several waits lead on, one that does not lead back into the chain is taken: a circle with a way out is no
    deadlock.
    """
    subject = "which" if before else start
    if start in stuck:
        return _Chain((start,), (f"{subject} {stuck[start].why}",))
    status = statuses.get(start)
    if status is None:
        words = f"{subject} {known[start]}" if start in known else "of which nothing is known here"
        return _Chain((start,), (words,))
    found = waits_of(status)
    own = [wait for wait in found if wait.on in OWN_PARTS]
    if own:  # a role that is working does not wait for others
        at = f"{own[0].what} ({own[0].on}, {duration(own[0].since_s)})"
        return _Chain((start,), (f"{subject} is at work: {at}",))
    circle: _Chain | None = None
    path = (*before, start)
    for wait, target in _ways(found, statuses, stuck, known):
        if target == start:
            continue
        words = f"{subject} waits {duration(wait.since_s)} for {wait.what} from {target}"
        if target == ACTORS:
            rest = _Chain((target,), ("of which none is there",))
        elif target in (DISK, CLUSTER):
            return _Chain((start, target), (words,), (wait.since_s,))
        elif target in path:
            rest = _Chain((target,), (CLOSED,))
        else:
            rest = _chain(target, statuses, stuck, known, path)
        chain = rest.after(start, words, wait.since_s)
        if not chain.closes:
            return chain
        circle = circle or chain
    return circle or _Chain((start,), (f"{subject} is {status.phase}, and waits for no other role",))


def _ways(
    found: Sequence[Wait], statuses: Mapping[str, StatusSnapshot], stuck: Mapping[str, Stuck], known: Mapping[str, str]
) -> list[tuple[Wait, str]]:
    """Each wait with each role that could end it: stuck roles first, then the longest waits."""
    ways = []
    for wait in found:
        if wait.on == ACTORS:
            targets = [role for role in (*statuses, *known) if _last(role).startswith("actor")] or [ACTORS]
        else:
            targets = [wait.on]
        ways += [(wait, target) for target in targets]
    return sorted(ways, key=lambda way: (way[1] not in stuck, -way[0].since_s))


def joined_by_address(statuses: Iterable[StatusSnapshot]) -> dict[str, float]:
    """Actors without a status file here, which joined by address: name -> seconds since they last sent anything.

    Relays and followers, which ask the buffer for no trees, are none.
    """
    statuses = list(statuses)
    found: dict[str, float] = {}
    for status in statuses:
        for facts in status.links.values() if status.role == BUFFER else ():
            peers = facts.get("peers") if facts.get("name", BUFFER) == BUFFER else None
            for peer in peers if isinstance(peers, Sequence) else ():
                try:
                    name, silent_s = str(peer["peer"]), float(peer["silent_s"])
                except (KeyError, TypeError, ValueError):
                    continue
                if _last(name).partition("-")[0] != LEARNER:
                    found[name] = silent_s
    others = {status.role for status in statuses} | _relays(statuses)
    return {name: silent_s for name, silent_s in found.items() if not {name, _own_name(name)} & others}


def _relays(statuses: Iterable[StatusSnapshot]) -> set[str]:
    """The peers that the buffer knows as relays."""
    found: set[str] = set()
    for status in statuses:
        relays = status.facts.get(BUFFER, {}).get("relays") if status.role == BUFFER else None
        found.update(relays if isinstance(relays, Mapping) else ())
    return found


def _own_name(peer: str) -> str:
    """What a peer of this run's own calls itself: its key has the name of its role, as where the run makes the keys, or
    is the host's own, which no other host's may be called.
    """
    key, _, own = peer.rpartition("/")
    return own if key and (own.startswith(key) or key == OWN_KEY) else peer


def _last(peer: str) -> str:
    """What a peer calls itself, whatever its key."""
    return peer.rpartition("/")[2]
