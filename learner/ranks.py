"""Decisions that all ranks take together: whether to train, save, end or stop next, and the number of a version.

Every method that communicates runs in the torch thread, and every rank calls it, in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import IntEnum

from atpo_async.core.errors import PeerLost, SetupError
from atpo_async.ops.disk import until_written
from atpo_async.run.rundir import RunDir
from learner.training.trainer import Trainer

log = logging.getLogger("atpo.learner")


class Wanted(IntEnum):
    """What a rank has when it has stopped waiting; all ranks do what the lowest of them allows."""

    STOP = 0
    """Nothing: it has to stop, or has failed."""
    END = 1
    """The buffer has no further batch."""
    CHECKPOINT = 2
    """The buffer needs a checkpoint before it can go on."""
    TRAIN = 3
    """A batch."""


class Ranks:
    """This rank among all of them.

    Args:
        trainer: whose process group the ranks are.
        rundir: where rank 0 counts versions.
    """

    def __init__(self, trainer: Trainer, rundir: RunDir) -> None:
        self.rank: int = trainer.accelerator.process_index
        self.num_ranks: int = trainer.accelerator.num_processes
        self._least = trainer.reductions.least
        self._same_everywhere = trainer.reductions.same_everywhere
        self._rundir = rundir
        # Other ranks would be waiting in torch, which gives up a little later and does not mention the disk.
        self._give_up_s = rundir.config.links.give_up_s if self.num_ranks > 1 else None

    @property
    def is_first(self) -> bool:
        """Rank 0 counts versions, publishes, evaluates and writes."""
        return self.rank == 0

    def agree(self, own: Wanted, batch_id: int, *, step: int) -> Wanted:
        """Agree on what all ranks do, once each has something for ``step`` or gives up.

        Raises:
            SetupError: they were given shares of different batches.
        """
        wanted = Wanted(int(self._least(float(own))))
        if wanted == Wanted.TRAIN and self.num_ranks > 1:
            first, last = (
                self._least(float(batch_id)),
                -self._least(-float(batch_id)),
            )
            if first != last:
                raise SetupError(
                    f"step {step}: the ranks were given shares of batches {first:.0f} to {last:.0f}; the buffer "
                    "has lost its journal since the first rank was served: start the run again, it goes on from its "
                    "checkpoint"
                )
        return wanted

    def first_says(self, flag: bool) -> bool:
        """Rank 0's decision, on every rank."""
        return bool(self._same_everywhere([float(flag)])[0])

    def same_numbers(self, own: Sequence[int]) -> list[int]:
        """Rank 0's numbers, on every rank."""
        return [int(number) for number in self._same_everywhere([float(number) for number in own])]

    def next_version(self) -> int:
        """Rank 0 counts it; every rank gets the same number.

        Raises PeerLost on every rank where the count is kept elsewhere and rank 0 was given no number.
        """
        own, lost = 0, PeerLost("rank 0 was given no number for the next version: its log says why")
        if self.is_first:
            try:
                own = until_written(
                    f"the count of versions in {self._rundir.path}",
                    self._rundir.next_version,
                    log=log,
                    give_up_s=self._give_up_s,
                )
            except PeerLost as exc:
                # The other ranks wait for this number.
                own, lost = -1, exc
        version = int(self._same_everywhere([own])[0])
        if version < 0:
            raise lost
        return version
