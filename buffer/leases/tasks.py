"""Which training task is begun next: the cursor over the data, and the tasks that are begun anew.  Pure."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from buffer.journal.entries import RetryEntry, RunEntry


class RetriedTask(NamedTuple):
    """A training task to lease anew: no batch has had its tree."""

    task_index: int
    attempts: int
    """Trees grown of it in vain."""


class TrainingTasks:
    """The training tasks of one run.

    Args:
        max_tasks: no task from this one on is begun; None for no end.
        max_attempts: a task is given up after more trees that were grown in vain.
    """

    def __init__(self, *, max_tasks: int | None, max_attempts: int) -> None:
        self.max_tasks = max_tasks
        self._max_attempts = max_attempts
        self.next_task = 0
        """The first that was never begun."""
        self.retries: deque[RetriedTask] = deque()
        """To begin first."""
        self._attempts: dict[int, int] = {}
        """Task under lease -> trees grown of it in vain, where there were any."""
        self.given_up = 0
        """Tasks that lost too many holders, or whose trees came too late too often."""

    @property
    def all_leased(self) -> bool:
        """Whether none is left to begin."""
        return self.max_tasks is not None and not self.retries and self.next_task >= self.max_tasks

    def begin(self) -> tuple[int, bool]:
        """The next task, and whether it is begun anew."""
        if not self.retries:
            task, self.next_task = self.next_task, self.next_task + 1
            return task, False
        task, attempts = self.retries.popleft()
        self.restore_attempts(task, attempts)
        return task, True

    def attempts(self, task: int) -> int:
        """Trees of a task that were grown in vain."""
        return self._attempts.get(task, 0)

    def settled(self, task: int) -> None:
        """A task has come to its end: trained on, or without anything to learn from."""
        self._attempts.pop(task, None)

    def give_up(self) -> None:
        """A task lost too many holders."""
        self.given_up += 1

    def retry(self, task: int, *, in_vain: bool = True) -> bool:
        """A task whose tree is gone before any batch had it is begun anew; False if it is given up instead.

        Args:
            task: its index.
            in_vain: whether the tree came too late, which counts against the task; a learner that starts over does
                not.
        """
        attempts = self._attempts.pop(task, 0) + in_vain
        if attempts > self._max_attempts:
            self.give_up()
            return False
        self.retries.append(RetriedTask(task, attempts))
        return True

    def snapshot(self, run: RunEntry) -> None:
        """Write what ``restore`` reads."""
        run.next_task, run.given_up = self.next_task, self.given_up
        run.again = tuple(RetryEntry(task_index=task, attempts=attempts) for task, attempts in self.retries)

    def restore(self, run: RunEntry) -> None:
        """As an earlier process left them."""
        self.next_task, self.given_up = run.next_task, run.given_up
        self.retries.extend(RetriedTask(each.task_index, each.attempts) for each in run.again)

    def restore_attempts(self, task: int, attempts: int) -> None:
        """Trees of a task that an earlier process saw grown in vain."""
        if attempts:
            self._attempts[task] = attempts
