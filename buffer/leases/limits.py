"""Whether the actor that asks is given another tree now, by its rate and by what the others can do (``leases.shares``).

Holds what is known for it: each actor's rate, the learner's pace, and since when trees have been left to faster actors.
Pure: seconds are passed in.
"""

from __future__ import annotations

from collections.abc import Iterator

from atpo_async.config import StalenessConfig
from atpo_async.core.vocabulary import Split
from buffer.leases.presence import ActorPresence
from buffer.leases.rates import Rates
from buffer.leases.shares import Fleet, Pace, Worker, most_training, others_sooner

FEW_ACTORS = 32
LOOK_AGAIN_S = 0.25
"""With more actors than these, which of them is the fastest is looked up so often, and not at each request."""


class ShareLimits:
    """The limits of one run.

    Args:
        staleness: of the run.
        rates: of the actors.
        actors: which of them are there.
        alone: no other actor is to be expected beside the first one.
    """

    def __init__(self, staleness: StalenessConfig, rates: Rates, actors: ActorPresence, *, alone: bool = True) -> None:
        self._max_lag = staleness.max_lag
        self._exact = staleness.exact_lag is not None
        self._rates = rates
        self._actors = actors
        self._least = 1 if alone else 2
        self.pace = Pace()
        self._left_since: dict[Split, float] = {}
        """Kind of trees -> since when slow actors have been refused the last ones and no other took one."""
        self._fastest: tuple[float, str, float | None] | None = None
        """(looked up at, its name, its rate)."""

    # --- who is there ------------------------------------------------------------------------------------------

    def workers(self, now: float, *, but: str = "") -> Iterator[tuple[str, Worker]]:
        """The actors that are there and whose rate is known."""
        for actor in self._rates:
            if actor == but or not self._actors.is_there(actor, now):
                continue
            rate = self._rates.turns_per_s(actor)
            if rate:
                yield actor, Worker(rate, self._rates.owed(actor))

    def _look_up(self, now: float) -> tuple[str, float | None]:
        if self._fastest is None or len(self._rates) <= FEW_ACTORS or now - self._fastest[0] >= LOOK_AGAIN_S:
            name, worker = max(self.workers(now), key=lambda found: found[1].rate, default=("", None))
            self._fastest = now, name, None if worker is None else worker.rate
        return self._fastest[1:]

    def fleet(self, actor: str, now: float) -> Fleet:
        """The actors that are there, ``actor`` asking."""
        _, fastest = self._look_up(now)
        number = max(self._actors.num_there, self._least)
        return Fleet(rate=self._rates.turns_per_s(actor), fastest=fastest, number=number)

    # --- decisions ---------------------------------------------------------------------------------------------

    def why_no_training(self, actor: str, *, batches_left: int, now: float) -> str | None:
        """Why ``actor`` may hold no further training tree; None if it may.

        Args:
            actor: that asks.
            batches_left: after the next batch, that may use a tree which it begins now.
            now: seconds.
        """
        if self._max_lag == 0 or self._exact:
            return None  # a batch waits for all its trees: ``why_left`` decides who grows them
        fleet = self.fleet(actor, now)
        if not (fleet.is_slow or fleet.is_unknown):
            return None
        fastest, _ = self._look_up(now)
        most = most_training(
            fleet,
            turns_per_tree=self._rates.turns_of_long_tree(),
            left_s=self.pace.until(batches_left, now),
            fastest_holds=self._rates.held(fastest, "train"),
        )
        if most is None or self._rates.held(actor, "train") < most:
            return None
        if fleet.rate is None:
            return f"{most} trees at once are given to an actor of which nothing is known yet"
        return (
            f"{most} trees at once are what this actor, at {fleet.rate:.3g} turns/s, finishes before they are older "
            f"than staleness.max_lag = {self._max_lag}"
        )

    def why_left(self, actor: str, kind: Split, remaining: int | None, now: float) -> str | None:
        """Why the last trees of a kind are left to faster actors; None if ``actor`` may begin one.

        They are left to them only for as long as ``actor`` would need for one: if none of them takes any meanwhile,
        it gets it.

        Args:
            actor: that asks.
            kind: of trees.
            remaining: trees that are still to be begun, in all; None where there is no end.
            now: seconds.
        """
        turns = self._rates.turns_per_tree(kind)
        if remaining is None or turns is None:
            return None
        fleet = self.fleet(actor, now)
        if not fleet.is_slow or fleet.rate is None or fleet.fastest is None:
            return None
        worker = Worker(fleet.rate, self._rates.owed(actor))
        took = worker.time_for(turns)
        if remaining > fleet.number * (fleet.fastest * took / turns + 1):
            return None  # far from the end: the others are not gone through
        if not others_sooner(
            worker, (each for _, each in self.workers(now, but=actor)), turns=turns, remaining=remaining
        ):
            return None
        if now - self._left_since.setdefault(kind, now) > took:
            return None
        what = "of an evaluation" if kind == "eval" else "to begin"
        return f"the last {remaining} trees {what} are left to faster actors, which finish them sooner"

    def granted(self, kind: Split) -> None:
        """A tree of a kind was begun or gone on with."""
        self._left_since.pop(kind, None)
