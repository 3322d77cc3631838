"""``atpo status RUN``: one screen of who waits for whom, and since when, from the status files of the roles."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from atpo_async.cli.common import EXIT_DONE, Asked
from atpo_async.run.host import host_id
from atpo_async.status import fleet, snapshot
from atpo_async.status.chains import waits_of
from atpo_async.status.fleet import FLEET, MOST_ROWS
from atpo_async.status.hangs import stopped_words
from atpo_async.status.run_view import JOINED, RoleView, RunView, as_json, look
from atpo_async.status.wording import duration, flat

SHOWN_WAITS = 3
"""Waits shown for each role."""
UNSAID = frozenset({"kind", "name", "endpoint", "waits"})
"""Facts of a link that the screen shows elsewhere."""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument(
        "run", metavar="RUN", help="run folder; of a run on a Ray cluster: ray://RUN (docs/clusters.md)"
    )
    parser.add_argument("--json", action="store_true", help="for programs: all status snapshots of the roles")


def run(asked: Asked) -> int:
    """Prints the screen, or JSON."""
    view = _on_ray(asked.args.run) if asked.args.run.startswith("ray://") else look(asked.args.run)
    if asked.args.json:
        print(as_json(view))
    else:
        # Lines are not wrapped in a pipe, so that words can be searched for in them.
        show(view, Console(highlight=False, width=None if sys.stdout.isatty() else 1000))
    return EXIT_DONE


def _on_ray(url: str) -> RunView:
    from atpo_async.api.places.on_ray import look_on_ray

    return look_on_ray(url)


def show(view: RunView, console: Console) -> None:
    """Print the screen."""
    console.print(Text(_headline(view)))
    if view.roles:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("role", "state", "process", "at", "loop ran", "waits for"):
            table.add_column(name, no_wrap=name != "waits for", overflow="fold")
        for name, role in view.roles.items():
            status = role.status
            loop = "–" if status.loop_age_s is None or not role.alive else f"{duration(status.loop_age_s)} ago"
            where = f"{status.pid}" if status.host == host_id() else f"{status.pid} on {status.hostname}"
            # The id of a process that has gone may be another's by now.
            where = "–" if role.state in ("ended", "gone") else where
            state = role.state if role.alive else f"{role.state}, last seen {duration(role.age_s)} ago"
            at = f"{status.phase} for {duration(status.phase_s)}" if role.alive else "–"
            colour = "red" if role.stuck is not None or role.state == "gone" else "green" if role.alive else "dim"
            # As plain text: names that roles chose may look like markup.
            cells = (Text(word) for word in (where, at, loop, _waits(role)))
            table.add_row(Text(name), Text(state, style=colour), *cells)
        for name, silent_s, number in _joined(view):
            state = f"heard {duration(silent_s)} ago" if number == 1 else f"last heard up to {duration(silent_s)} ago"
            table.add_row(Text(name), Text(state, style="green"), "–", JOINED, "–", "known only where it runs")
        console.print(table)
        _show_fleet(view, console)
        links = [
            f"  {name}: {flat(_worth_saying(facts))}"
            for role in view.roles.values()
            if role.alive
            for name, facts in role.status.links.items()
        ]
        for line in ["links:", *links] if links else []:
            console.print(Text(line))
        for role in view.roles.values():
            for name, facts in role.status.facts.items() if role.alive else ():
                if name == FLEET:
                    continue
                whose = role.status.role if role.status.role.startswith(name) else f"{role.status.role}, {name}"
                console.print(Text(f"{whose}: {flat(facts)}"))
    for file, fault in view.damaged.items():
        console.print(Text(f"{snapshot.FOLDER}/{file} is damaged and was left out: {fault}"))
    for sentence in view.sentences:
        console.print(Text(f"→ {sentence}"))
    for role in view.roles.values():
        if role.alive and role.status.stack:
            console.print(Text(f"{role.status.role} stands still in:"))
            for line in role.status.stack[-5:]:
                console.print(Text(f"    {line}"))


def _joined(view: RunView) -> list[tuple[str, float, int]]:
    """Actors that joined by address: each one, or where there are many their number, how long the quietest is silent,
    and for how many the line stands."""
    if len(view.joined) <= MOST_ROWS:
        return [(name, silent_s, 1) for name, silent_s in view.joined.items()]
    return [(f"{len(view.joined)} actors", max(view.joined.values()), len(view.joined))]


def _show_fleet(view: RunView, console: Console) -> None:
    """The actors as the buffer sees them."""
    found = fleet.table(view.fleet)
    if found is None:
        return
    console.print(Text(found.title))
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(found.header):
        shown.add_column(name, justify="left" if i < found.header.index("turns/s") else "right", no_wrap=True)
    for row in found.rows:
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)
    for note in found.notes:
        console.print(Text(f"  {note}"))


def _headline(view: RunView) -> str:
    run = f"run {view.rundir.path} ({view.rundir.run_id})"
    if view.supervisor is not None and view.supervisor_stopped:
        goes_on = "its roles go on, and none that ends is started again" if view.running_roles else "no role runs"
        return f"{run}: its supervisor, process {view.supervisor}, {stopped_words([view.supervisor])}; {goes_on}"
    if view.supervisor is not None:
        return f"{run}: running, supervised by process {view.supervisor}"
    if view.running_roles:
        return f"{run}: roles run without a supervisor: {', '.join(view.running_roles)}"
    steps = view.rundir.config.run.steps
    if view.steps >= steps:
        done = f"its {steps} steps are done"
    else:
        done = f"its last checkpoint is of step {view.steps} of {steps}" if view.steps else "it has no checkpoint"
    if not view.roles:
        return f"{run}: not running; none of its roles was ever started; {done}"
    newest = min(role.age_s for role in view.roles.values())
    gone = [name for name, role in view.roles.items() if role.state == "gone"]
    lost = f"; killed or crashed: {', '.join(gone)} (logs: {view.rundir.path / 'logs'})" if gone else ""
    return f"{run}: not running; the last sign of a role is {duration(newest)} old; {done}{lost}"


def _worth_saying(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a link, without empty ones and those shown elsewhere."""
    known = {name: value for name, value in facts.items() if name not in UNSAID and value not in ("", None, [], {})}
    return {
        name: [_worth_saying(part) if isinstance(part, Mapping) else part for part in value]
        if isinstance(value, list)
        else value
        for name, value in known.items()
    }


def _waits(role: RoleView) -> str:
    if not role.alive:
        return "–"
    if role.stuck is not None:
        return role.stuck.why
    shown = [
        f"{wait.what} from {wait.on} {duration(wait.since_s)}{f' (x{wait.count})' if wait.count > 1 else ''}"
        for wait in waits_of(role.status)
    ]
    more = f"; and {len(shown) - SHOWN_WAITS} more" if len(shown) > SHOWN_WAITS else ""
    return "; ".join(shown[:SHOWN_WAITS]) + more or "–"
