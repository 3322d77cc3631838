"""The oracle of exactly-once work: runs of scripted roles that are killed and started again, and the judgement of each.

At the end of a run the learner's lineage must hold every task the intended number of times.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lmdb

from atpo_async import config as configuration
from atpo_async.core.naming.shards import Shard, index_of, shard_roles
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.files import write_atomic
from atpo_async.run.rundir import RunDir
from buffer.journal import entries
from tests.fault_support import Role, Spawner, Tricks, until
from tests.links_support import reserved_endpoints
from tests.scripted_roles_support import (
    ALLOWED,
    KILL_POINTS,
    PROBLEMS,
    STEPS,
    STOP_AT,
    STOPPED_AT,
    TAKEN,
    Lineage,
    lines,
)
from tests.scripted_trees_support import planned, possible_trees

Victims = Literal["buffer", "learner", "actor", "all", "shard"]


BASE: dict[str, dict[str, Any]] = {
    "run": {"steps": 100_000},
    "search": {"initial_rollouts": 4, "rounds": 1, "branches": 2},
    "staleness": {"trees_per_batch": 4, "max_lag": 4, "max_uses": 1},
    "buffer": {"max_reissues": 1000, "lease_lifetime_s": 2.0, "max_bytes": 4 << 20},
    "actor": {"trees_in_flight": 3, "report_every_s": 0.1},
    "links": {"heartbeat_s": 0.1, "deadline_s": 10.0, "give_up_s": 60.0, "window": 32},
    "eval": {"at_start": False, "at_end": False, "every_steps": 0},
}


def make_run(folder: Path, **sections: dict[str, Any]) -> RunDir:
    """A run folder with its endpoints chosen: what ``atpo train`` makes, without the list of installed packages."""
    data = {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in {*BASE, *sections}}
    data["run"] |= {"name": folder.name, "dir": str(folder.parent)}
    config = configuration.build(data)
    for name in ("logs", "checkpoints"):
        (folder / name).mkdir(parents=True)
    write_atomic(folder / "config.json", json.dumps(config.model_dump(mode="json")))
    write_atomic(
        folder / "run.json", json.dumps({"run_id": f"{folder.name}-0", "name": folder.name, "created": time.time()})
    )
    rundir = RunDir.open(folder)
    rundir.write_endpoints(reserved_endpoints())
    return rundir


@dataclass(frozen=True, slots=True)
class Kill:
    """Whom to kill, and when: where the learner stands still, or some time after it got so far."""

    victims: Victims
    point: str
    """One of ``KILL_POINTS``; empty: at a moment."""
    after_steps: int
    """Further steps of the learner before this kill is prepared."""
    after_s: float
    """And then this long, where no kill point is named."""


def plan_kills(seed: int, count: int, *, shards: int = 1) -> list[Kill]:
    """``count`` kills, the last of them sometimes at the very end of the run."""
    rng = random.Random(seed)
    found = []
    everyone: tuple[Victims, ...] = ("buffer", "learner", "actor", "all")
    if shards > 1:
        everyone = ("buffer", "shard", "shard", "learner", "actor", "all")
    for i in range(count):
        victims = rng.choice(everyone)
        point = rng.choice(KILL_POINTS[1:-1]) if rng.random() < 0.5 else ""
        if i == count - 1 and seed % 3 == 0:
            # Not an actor alone: the others may be done with it by then.
            victims, point = rng.choice([name for name in everyone if name != "actor"]), "finishing"
        found.append(Kill(victims, point, rng.randint(0, 2), rng.uniform(0.0, 0.03)))
    return found


@dataclass(kw_only=True)
class Verdict:
    """What came of a run."""

    problems: list[str]
    exceptions: list[str]
    """Tasks that were rightly not trained on as they were meant to be, one by one."""
    kills: Counter[str]
    """Victim, and victim at kill point -> how often."""
    steps: int
    lost_steps: int
    """Steps trained and lost with a learner."""
    seconds: float


class Roles:
    """The processes of one scripted run.

    Args:
        rundir: made by ``make_run``.
        spawner: forks them.
        seed: of the script.
        actors: how many.
        checkpoint_every: batches.
        turn_s, step_s: an action and a batch take up to twice as long.
        endpoints: where actors and learner look for the buffer, if not where it binds.
        tricks: played on the buffer.
        env: for all of them.
    """

    def __init__(
        self,
        rundir: RunDir,
        spawner: Spawner,
        *,
        seed: int,
        actors: int = 2,
        checkpoint_every: int = 3,
        turn_s: float = 0.001,
        step_s: float = 0.002,
        endpoints: Endpoints | None = None,
        tricks: Tricks | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.rundir = rundir
        self.checkpoint_every = checkpoint_every
        self._spawner = spawner
        self._env = dict(env or {})
        there = endpoints or rundir.read_endpoints()
        folder = str(rundir.path)
        played = {**asdict(tricks or Tricks()), "shards_apart": True}
        self._how: dict[str, tuple[str, tuple[Any, ...]]] = {
            "buffer": ("tests.fault_support:buffer_role", (folder, played)),
            **{
                name: ("tests.fault_support:buffer_role", (folder, played, name))
                for name in shard_roles(rundir.config.buffer.shards)
            },
            "learner": (
                "tests.scripted_roles_support:run_learner",
                (folder, {"checkpoint_every": checkpoint_every, "step_s": step_s, "endpoint": there.learner}),
            ),
        }
        for i in range(actors):
            how = {"seed": seed, "turn_s": turn_s, "endpoint": there.actors}
            self._how[f"actor-{i}"] = ("tests.scripted_roles_support:run_actor", (folder, f"actor-{i}", how))
        self.alive: dict[str, Role] = {}

    @property
    def names(self) -> list[str]:
        return list(self._how)

    def start(self, *names: str) -> None:
        for name in names or self._how:
            target, args = self._how[name]
            log = self.rundir.log_path(name, self.rundir.next_attempt(name))
            self.alive[name] = self._spawner.start(name, target, *args, log=log, **self._env)

    def kill(self, *names: str) -> None:
        """All at once: a signal to each first, then the waiting."""
        chosen = [self.alive.pop(name) for name in names or list(self.alive) if name in self.alive]
        for role in chosen:
            if role.poll() is None:
                os.kill(role.pid, signal.SIGKILL)
        for role in chosen:
            role.kill()

    @property
    def steps(self) -> int:
        """Steps trained so far over all attempts, those lost again included."""
        return len(lines(self.rundir.path, STEPS))

    def story(self) -> str:
        """What a failure should show."""
        parts = [f"alive: {sorted(self.alive)}; steps: {self.steps}"]
        for log in sorted((self.rundir.path / "logs").glob("*.log")):
            parts.append(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)


GRACE_S = 1.0
"""After the buffer's end, for the others."""
NUM_KILLS = 5
NUM_STEPS = 40
"""Of a run that nobody disturbs: more than its kills let it have before they have struck."""


def run_oracle(folder: Path, spawner: Spawner, *, seed: int, num_kills: int = NUM_KILLS, shards: int = 1) -> Verdict:
    """One scripted run with kills, and what came of it."""
    rng = random.Random(f"run {seed}")
    max_uses = 1 + seed % 2
    num_tasks = NUM_STEPS * BASE["staleness"]["trees_per_batch"] // max_uses
    publish_every = 1 + (seed // 2) % 2
    # Where every tree is used twice, most seeds let none grow too old: then none may be left out.
    max_lag = rng.choice((2, 4, 8)) if max_uses == 1 or seed % 8 == 7 else 500
    rundir = make_run(
        folder,
        run={"seed": seed, "max_tasks": num_tasks},
        staleness={"max_uses": max_uses, "publish_every": publish_every, "max_lag": max_lag},
        buffer={"shards": shards},
    )
    roles = Roles(rundir, spawner, seed=seed, actors=rng.randint(1, 3), checkpoint_every=rng.randint(1, 3))
    driver = Driver(roles, rng)
    try:
        driver.run(plan_kills(seed, num_kills, shards=shards))
    finally:
        roles.kill()
    return judge(rundir, seed=seed, problems=driver.problems, kills=driver.kills, began=driver.began)


class Driver:
    """Kills and starts again, as a supervisor and its user would."""

    def __init__(self, roles: Roles, rng: random.Random) -> None:
        self.roles = roles
        self.rng = rng
        self.kills: Counter[str] = Counter()
        self.problems: list[str] = []
        self.began = time.monotonic()
        self._folder = roles.rundir.path
        self._ended: set[str] = set()
        self._buffer_ended_at: float | None = None

    def run(self, kills: Sequence[Kill]) -> None:
        self.allow(0)
        self.roles.start()
        for kill in kills:
            if not self._prepared(kill):
                break
            self._strike(kill)
        self.finish()

    def finish(self) -> None:
        """Waits for: the run's end, with nobody disturbed."""
        (self._folder / ALLOWED).unlink(missing_ok=True)
        self.until(lambda: self._ended >= set(self.roles.names), "the run's end")

    def until(self, condition: Callable[[], Any], what: str) -> bool:
        """True once ``condition`` holds; False once the run is over without.  Who dies by itself is a problem."""

        def look() -> bool:
            for name, role in list(self.roles.alive.items()):
                code = role.poll()
                if code is None:
                    continue
                del self.roles.alive[name]
                self._ended.add(name)
                if code != 0:
                    self.problems.append(f"{name} ended with {code} by itself: {role.said()[-1500:]}")
                    if len(self.problems) > 3:
                        raise AssertionError(f"the roles do not stay up\n{self.roles.story()}")
                    self._start(name)
            self._look_after_the_end()
            return bool(condition()) or self._ended >= set(self.roles.names)

        try:
            until(look, what, story=self.roles.story)
        except AssertionError as exc:
            self.problems.append(str(exc))
            return False
        return bool(condition())

    def _look_after_the_end(self) -> None:
        """What a supervisor and its user do when not everybody learnt that the run is over."""
        buffers = {name for name in self.roles.names if name == "buffer" or index_of(name) is not None}
        if not buffers & self._ended:
            self._buffer_ended_at = None
            return
        now = time.monotonic()
        self._buffer_ended_at = self._buffer_ended_at or now
        if now - self._buffer_ended_at < GRACE_S:
            return
        if "learner" in self._ended:
            left = list(self.roles.alive)
            self.roles.kill(*left)
            self._ended |= set(left)
        else:
            self._start(*self._ended)

    def _start(self, *names: str) -> None:
        self._ended -= set(names)
        self.roles.start(*names)

    def allow(self, steps: int) -> None:
        write_atomic(self._folder / ALLOWED, str(steps))

    def _prepared(self, kill: Kill) -> bool:
        goal = self.roles.steps + kill.after_steps
        if kill.point == "finishing":
            (self._folder / ALLOWED).unlink(missing_ok=True)
        else:
            # Enough to come by every kill point once, with a checkpoint; or to be in the middle of something.
            self.allow(goal + self.roles.checkpoint_every + 1)
            if not self.until(lambda: self.roles.steps >= goal, f"step {goal}"):
                return False
        if not kill.point:
            return True
        (self._folder / STOPPED_AT).unlink(missing_ok=True)
        (self._folder / STOP_AT).write_text(kill.point)
        there = self.until(
            lambda: (self._folder / STOPPED_AT).exists() and self.roles.alive["learner"].frozen,
            f"the learner at {kill.point!r}",
        )
        (self._folder / STOP_AT).unlink(missing_ok=True)
        return there

    def _strike(self, kill: Kill) -> None:
        if not kill.point:
            time.sleep(kill.after_s)  # a moment of chance: nothing is waited for
        actors = [name for name in self.roles.alive if name.startswith("actor")]
        shards = [name for name in self.roles.alive if index_of(name) is not None]
        victims = {
            "all": list(self.roles.alive),
            "actor": [self.rng.choice(actors)] if actors else [],
            "shard": [self.rng.choice(shards)] if shards else [],
        }.get(kill.victims, [kill.victims])
        victims = [name for name in victims if name in self.roles.alive]
        self.roles.kill(*victims)
        self.kills[kill.victims] += bool(victims)
        if kill.point:
            self.kills[f"{kill.victims} at {kill.point}"] += bool(victims)
            learner = self.roles.alive.get("learner")
            if learner is not None:
                learner.thaw()
        time.sleep(self.rng.choice((0.0, 0.01, 0.05)))  # how long the supervisor happens to take
        self.rng.shuffle(victims)
        self._start(*victims)


def judge(
    rundir: RunDir, *, seed: int, problems: Sequence[str], kills: Counter[str] | None = None, began: float = 0.0
) -> Verdict:
    """Every task exactly as often as intended, every byte as the script has it, no version twice."""
    config, folder = rundir.config, rundir.path
    problems = [*problems, *lines(folder, PROBLEMS)]
    exceptions: list[str] = []
    lineage = Lineage.load(folder)
    uses: Counter[int] = Counter()
    fresh_from: dict[int, int] = {}
    for expected, trace in enumerate(lineage.traces):
        if trace.step != expected:
            problems.append(f"batch {trace.step} stands in the lineage where {expected} should")
        if len(set(trace.trees)) != len(trace.trees) or len(set(trace.tasks)) != len(trace.tasks):
            problems.append(f"batch {trace.step} holds a tree twice: {trace.trees}")
        uses.update(trace.tasks)
        fresh_from.update(zip(trace.tasks, trace.fresh_from, strict=True))
        for tree_id, task, hashes in zip(trace.trees, trace.tasks, trace.hashes, strict=True):
            lacking = possible_trees(seed, task).get(tuple(hashes))
            if lacking is None:
                problems.append(f"tree {tree_id} of batch {trace.step} is not what task {task} makes")
            elif lacking:
                exceptions.append(f"tree {tree_id} of task {task} lacks {lacking} turns of a lost holder")
    versions = [trace.version for trace in lineage.traces]
    if sorted(set(versions)) != versions:
        problems.append(f"versions of the lineage do not rise: {versions}")
    latest = max(versions, default=0)
    taken = [int(line) for line in lines(folder, TAKEN)]
    if len(set(taken)) != len(taken):
        problems.append(f"version numbers were used twice: {[v for v, n in Counter(taken).items() if n > 1]}")
    for task in range(config.run.max_tasks or 0):
        kind = planned(seed, task).kind
        wanted = config.staleness.max_uses if kind == "plain" else 0
        too_old = latest - fresh_from.get(task, latest) > config.staleness.max_lag
        if 0 < uses[task] < wanted and too_old:
            exceptions.append(f"task {task} was trained on {uses[task]} times, then its tree was too old")
        elif uses[task] != wanted:
            problems.append(f"task {task} ({kind}) was trained on {uses[task]} times, not {wanted}")
        elif kind != "plain":
            exceptions.append(f"task {task} has nothing to learn from: {kind}")
    strangers = {task for task in uses if task >= (config.run.max_tasks or 0)}
    if strangers:
        problems.append(f"tasks that the run does not have: {sorted(strangers)}")
    problems += _contradictions(rundir, steps=len(lineage.traces))
    return Verdict(
        problems=problems,
        exceptions=exceptions,
        kills=kills or Counter(),
        steps=len(lineage.traces),
        lost_steps=len([s for s in lines(folder, STEPS) if s.isdecimal()]) - len(lineage.traces),
        seconds=time.monotonic() - began,
    )


def _contradictions(rundir: RunDir, *, steps: int) -> list[str]:
    """What the buffer's journals say after the run and the lineage does not."""
    count = rundir.config.buffer.shards
    shards = [Shard(index, count) for index in range(count)]
    return [found for shard in shards for found in _contradictions_of(rundir, shard, steps=steps)]


def _contradictions_of(rundir: RunDir, shard: Shard, *, steps: int) -> list[str]:
    folder = rundir.path / "journal"
    if shard.count > 1:
        folder /= f"shard-{shard.index}-of-{shard.count}"
    with lmdb.open(str(folder), readonly=True, lock=False, max_dbs=4) as env:
        table = env.open_db(b"state", create=False)
        with env.begin() as txn:
            state = {bytes(key): bytes(value) for key, value in txn.cursor(db=table)}
    rest = entries.read(state, entries.RUN, entries.RunEntry)
    assert rest is not None
    found = [
        f"{folder.name} still has {key.decode()} after a run that used it up and has a checkpoint of it"
        for key in state
        if key.startswith((entries.TREE, entries.BATCH))
    ]
    if (rest.step, rest.again) != (steps - 1, ()) and rest.step != steps:
        found.append(f"{folder.name} ends at step {rest.step} ({rest.again=}), the lineage at {steps}")
    leased = len(range(shard.index, rest.next_task, shard.count))
    if leased != shard.num_tasks(rundir.config.run.max_tasks or 0) or rest.given_up:
        found.append(f"{folder.name} has leased tasks below {rest.next_task} and given up {rest.given_up} trees")
    return found
