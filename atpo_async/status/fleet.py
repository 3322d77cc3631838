"""The actors of a run as the buffer sees them, in a few lines however many there are.  Pure.

The buffer publishes a row for each under ``FLEET`` (``status.facts``): also of actors that joined by address and have
no status file in the run's folder.  Of a large fleet the hosts are listed, and the actors that are worth a look: the
slowest, and those that are silent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from atpo_async.status.snapshot import StatusSnapshot
from atpo_async.status.wording import duration

FLEET = "fleet"
"""Name under which the buffer publishes its actors."""
MOST_ROWS = 12
"""Up to so many actors are listed one by one; of more, so many hosts are."""
MOST_NAMED = 3
"""Of the slowest, and of the silent."""


@dataclass(frozen=True, kw_only=True)
class ActorRow:
    """One actor."""

    name: str
    host: str
    turns_per_s: float | None
    """While it holds leases; None where it is not known yet."""
    share: float | None
    """Of the turns that came of late from all actors."""
    lag: float | None
    """Versions that its turns were behind the learner when they came, the mean."""
    trees: int
    """That it grows now."""
    done: int
    silent_s: float
    silent: bool
    """For so long that its leases were given to others."""


@dataclass(frozen=True, kw_only=True)
class FleetTable:
    """Lines for the screen."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def rows_of(statuses: Iterable[StatusSnapshot]) -> list[ActorRow]:
    """The actors in the buffer's snapshot; what makes no sense is left out."""
    found = []
    for status in statuses:
        for name, said in status.facts.get(FLEET, {}).items():
            try:
                found.append(_row(name, said))
            except (KeyError, TypeError, ValueError, AttributeError):
                continue
    return found


def _row(name: str, said: Mapping[str, Any]) -> ActorRow:
    def number(key: str) -> float | None:
        return None if said[key] is None else float(said[key])

    return ActorRow(
        name=name, host=str(said["host"]), turns_per_s=number("turns_per_s"), share=number("share"), lag=number("lag"),
        trees=int(said["trees"]), done=int(said["done"]), silent_s=float(said["silent_s"]), silent=bool(said["silent"]),
    )  # fmt: skip


def table(rows: list[ActorRow]) -> FleetTable | None:
    """The actors one by one where they are few, else by host; None where there is none."""
    if not rows:
        return None
    hosts = {row.host for row in rows}
    rate = sum(row.turns_per_s or 0.0 for row in rows)
    title = f"actors: {len(rows)} on {_hosts(len(hosts))}, {_rate(rate)} turns/s together, {_lag(rows)}"
    if len(rows) <= MOST_ROWS:
        return FleetTable(
            title=title,
            header=("actor", "host", "turns/s", "share", "lag", "trees", "done", "heard"),
            rows=tuple(_cells(row) for row in rows),
            notes=(),
        )
    return FleetTable(
        title=title,
        header=("host", "actors", "turns/s", "share", "lag", "trees", "done", "silent"),
        rows=tuple(_by_host(rows)),
        notes=tuple(_worth_a_look(rows, len(hosts))),
    )


def _cells(row: ActorRow) -> tuple[str, ...]:
    heard = f"{duration(row.silent_s)} ago" + (", its leases went to others" if row.silent and not row.trees else "")
    return (
        row.name, row.host or "–", _rate(row.turns_per_s), _share(row.share), _number(row.lag), str(row.trees),
        str(row.done), heard,
    )  # fmt: skip


def _by_host(rows: list[ActorRow]) -> list[tuple[str, ...]]:
    """Those with the most actors."""
    by_host: dict[str, list[ActorRow]] = {}
    for row in rows:
        by_host.setdefault(row.host, []).append(row)
    largest = sorted(by_host.items(), key=lambda each: (-len(each[1]), each[0]))[:MOST_ROWS]
    return [
        (
            host or "not said", str(len(theirs)), _rate(sum(row.turns_per_s or 0.0 for row in theirs)),
            _share(sum(row.share or 0.0 for row in theirs)), _number(_mean_lag(theirs)),
            str(sum(row.trees for row in theirs)), str(sum(row.done for row in theirs)),
            str(sum(row.silent for row in theirs) or "–"),
        )
        for host, theirs in largest
    ]  # fmt: skip


def _worth_a_look(rows: list[ActorRow], hosts: int) -> list[str]:
    found = [] if hosts <= MOST_ROWS else [f"and {_hosts(hosts - MOST_ROWS)} with no more actors each"]
    known = sorted((row for row in rows if row.turns_per_s is not None), key=lambda row: row.turns_per_s or 0.0)
    if known:
        found.append(
            "slowest: " + "; ".join(f"{_who(row)}, {_rate(row.turns_per_s)} turns/s" for row in known[:MOST_NAMED])
        )
    if new := len(rows) - len(known):
        found.append(f"of {new} the rate is not known yet")
    silent = sorted((row for row in rows if row.silent), key=lambda row: -row.silent_s)
    if silent:
        named = "; ".join(f"{_who(row)}, for {duration(row.silent_s)}" for row in silent[:MOST_NAMED])
        more = f"; and {len(silent) - MOST_NAMED} more" if len(silent) > MOST_NAMED else ""
        found.append(f"silent: {named}{more}")
    return found


def _who(row: ActorRow) -> str:
    return f"{row.name} on {row.host}" if row.host else row.name


def _hosts(number: int) -> str:
    return f"{number} host{'s' if number != 1 else ''}"


def _mean_lag(rows: list[ActorRow]) -> float | None:
    """Over the turns: each actor's counts by its share."""
    known = [(row.lag, row.share or 0.0) for row in rows if row.lag is not None]
    weight = sum(share for _, share in known)
    return sum(lag * share for lag, share in known) / weight if weight else None


def _lag(rows: list[ActorRow]) -> str:
    lag = _mean_lag(rows)
    return "no turn yet" if lag is None else f"turns {lag:.1f} versions behind the learner when they come"


def _rate(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
