"""The doors of this program: every choice of a configuration that also takes ``package.module:name``.

``docs/extending.md`` has one page a door.  A built-in one that is added to a door's ``package`` is known by its
module's name; nothing else has to be told.
"""

from __future__ import annotations

from typing import Any

from atpo_async.core.doors import Door

ENVIRONMENT: Door[Any] = Door(
    field="environment.name",
    what="an environment",
    protocol='docs/extending.md, "Environment"',
    built_in={"hopqa": "atpo_async.environments.hopqa.environment:make"},
    call=("tokenizer",),
    parts=("stop_token_ids", "num_tasks", "start", "replay"),
)
