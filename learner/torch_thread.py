"""The one thread in which torch runs; each call in it is a named wait (``status.waits``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from atpo_async.status import waits

T = TypeVar("T")

WAITED_FOR = {
    **dict.fromkeys(("agree", "wait_for_everyone"), "learner"),
    **dict.fromkeys(("save_checkpoint", "export", "try_export", "resume"), waits.DISK),
}
"""Function name -> what its call in the torch thread waits for, other than torch: the other ranks, the disk."""


class TorchThread:
    """The one thread in which torch runs, in order.  ``await thread(function, …)``.

    Args:
        num_threads: that torch itself may use in a call; None for its own choice.
    """

    def __init__(self, num_threads: int | None) -> None:
        def begin() -> None:
            if num_threads is not None:
                torch.set_num_threads(num_threads)

        self._executor = ThreadPoolExecutor(1, thread_name_prefix="torch", initializer=begin)

    async def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        name = getattr(function, "__name__", "a call").strip("_")
        with waits.waiting("the learner", name.replace("_", " "), on=WAITED_FOR.get(name, waits.TORCH)):
            return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
