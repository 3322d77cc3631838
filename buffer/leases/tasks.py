"""Decides which training task is begun next: the cursor over the data, and the tasks that are retried.  Pure."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from atpo_async.core.naming.shards import WHOLE, Shard
from buffer.journal.entries import RetryEntry, RunEntry


class RetriedTask(NamedTuple):
    """A training task to lease anew: no batch has had its tree."""

    task_index: int
    attempts: int
    """Trees of it that no batch could use."""


class TrainingTasks:
    """The training tasks of one run.

    Args:
        max_tasks: no task from this one on is begun; None for no end.
        max_attempts: a task is given up after more trees than this that no batch could use.
        shard: only its tasks.
    """

    def __init__(self, *, max_tasks: int | None, max_attempts: int, shard: Shard = WHOLE) -> None:
        self.max_tasks = max_tasks
        self._max_attempts = max_attempts
        self._shard = shard
        self.next_task = shard.index
        """The first task that was never begun."""
        self.retries: deque[RetriedTask] = deque()
        """Tasks to retry, before new ones."""
        self._attempts: dict[int, int] = {}
        """Task under lease -> trees of it that no batch could use, where there were any."""
        self.given_up = 0
        """Tasks that lost too many holders, or whose trees came too late too often."""

    @property
    def any_begun(self) -> bool:
        """Whether a task was ever begun."""
        return self.next_task > self._shard.index

    @property
    def all_leased(self) -> bool:
        """Whether none is left to begin."""
        return self.max_tasks is not None and not self.retries and self.next_task >= self.max_tasks

    @property
    def num_left(self) -> int | None:
        """Tasks that are left to begin; None where there is no end."""
        return None if self.max_tasks is None else max(self.max_tasks - self.next_task, 0) + len(self.retries)

    def begin(self) -> tuple[int, bool]:
        """The next task, and whether it is a retry."""
        if not self.retries:
            task, self.next_task = self.next_task, self.next_task + self._shard.count
            return task, False
        task, attempts = self.retries.popleft()
        self.restore_attempts(task, attempts)
        return task, True

    def attempts(self, task: int) -> int:
        """Trees of a task that no batch could use."""
        return self._attempts.get(task, 0)

    def settled(self, task: int) -> None:
        """A task is finished: trained on, or without a signal."""
        self._attempts.pop(task, None)

    def give_up(self) -> None:
        """A task lost too many holders."""
        self.given_up += 1

    def retry(self, task: int, *, in_vain: bool = True) -> bool:
        """Retry a task whose tree was dropped before any batch had it; False if it is given up instead.

        Args:
            task: its index.
            in_vain: whether the tree came too late, which counts against the task; a restart of the learner does not.
        """
        attempts = self._attempts.pop(task, 0) + in_vain
        if attempts > self._max_attempts:
            self.give_up()
            return False
        self.retries.append(RetriedTask(task, attempts))
        return True

    def put_back(self, task: int) -> None:
        """A task that was begun last comes next again, as though it had not been begun."""
        self.retries.appendleft(RetriedTask(task, self._attempts.pop(task, 0)))

    def snapshot(self, run: RunEntry) -> None:
        """Write what ``restore`` reads."""
        run.next_task, run.given_up = self.next_task, self.given_up
        run.again = tuple(RetryEntry(task_index=task, attempts=attempts) for task, attempts in self.retries)

    def restore(self, run: RunEntry) -> None:
        """As an earlier process left them."""
        self.next_task, self.given_up = max(run.next_task, self._shard.index), run.given_up
        self.retries.extend(RetriedTask(each.task_index, each.attempts) for each in run.again)

    def restore_attempts(self, task: int, attempts: int) -> None:
        """Restore the number of a task's trees that no batch could use."""
        if attempts:
            self._attempts[task] = attempts
