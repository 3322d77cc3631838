"""Decides when the user is told that the journal's disk is slow: leases, batches and acknowledgements wait for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from atpo_async.ops import notices

SLOW_S = 0.02
"""Mean of a batch's commits; a good disk takes a tenth of it."""
BATCHES = 5
"""So many slow batches in a row are no passing load."""


class SlowCommits:
    """Looks at the commits of each batch.

    Args:
        folder: of the journal.
        synced: ``buffer.journal_sync``.
        post: takes the line for the user's terminal; once.
    """

    def __init__(self, folder: Path, *, synced: bool, post: Callable[[str, str], None] = notices.post) -> None:
        self._folder, self._synced, self._post = folder, synced, post
        self._slow = 0
        self._told = False

    def note(self, gauges: Mapping[str, float]) -> None:
        """The journal's gauges of one batch."""
        mean_s = gauges.get("buffer/commit_s/mean")
        if mean_s is None:
            return
        self._slow = self._slow + 1 if mean_s > SLOW_S else 0
        if self._told or self._slow < BATCHES:
            return
        self._told = True
        way_out = "name a faster disk with --buffer.journal_dir"
        if self._synced:
            way_out += ", or give up surviving a power cut with --buffer.journal_sync false"
        self._post(
            f"a commit of the journal in {self._folder} takes {1e3 * mean_s:.0f} ms, and leases, batches and "
            f"acknowledgements wait for commits: where learner and actors both wait, {way_out}",
            "slow commits",
        )
