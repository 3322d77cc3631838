"""The doors of this program: every choice of a configuration that also takes ``package.module:name``.

``docs/extending.md`` has one page a door.  A built-in one that is added to a door's ``package`` is known by its
module's name; it needs no other entry.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from atpo_async.core.doors import Door

ENVIRONMENT: Door[Any] = Door(
    field="environment.name",
    options="environment.options",
    what="an environment",
    protocol='docs/tasks.md (for one in tokens docs/extending.md, "Environment"; its mixin ReplayFork brings replay)',
    built_in={
        "hopqa": "atpo_async.environments.hopqa.environment:make",
        "ledger_qa": "atpo_async.environments.ledger_qa.environment:make",
        "passage_qa": "atpo_async.environments.passage_qa.environment:make",
        "next_text": "atpo_async.environments.next_text.environment:make",
        "search_qa": "atpo_async.environments.search_qa.environment:make",
    },
    call=("tokenizer",),
    parts=("stop_token_ids", "num_tasks", "start", "replay"),
)

ONE_OF_ENVIRONMENTS: Door[Any] = dataclasses.replace(
    ENVIRONMENT, field="environments.name", options="environments.options"
)
"""The same door, as an entry of ``[[environments]]`` names it."""


def environment_door(number: int | None) -> Door[Any]:
    """The door of entry ``number`` of ``[[environments]]``, for messages that name its fields; None: of
    ``[environment]``."""
    if number is None:
        return ENVIRONMENT
    section = f"environments.{number}"
    return dataclasses.replace(ENVIRONMENT, field=f"{section}.name", options=f"{section}.options")


STRATEGY: Door[Any] = Door(
    field="search.strategy",
    options="search.strategy_options",
    what="an expansion strategy",
    protocol='docs/extending.md, "Expansion strategy"',
    package="actors.expansion.strategies",
    attribute="select",
    hyphens=True,
    call=("tree", "count", "rng", "settings"),
)

ONLINE_RULE: Door[Any] = dataclasses.replace(
    STRATEGY,
    what="an online expansion rule",
    protocol='docs/extending.md, "Online expansion"',
    package="actors.expansion.online",
    attribute="decide",
    call=("tree", "turn_id", "count", "rng", "settings"),
)
"""The same field, as it is read with ``search.expand = "online"``."""


def strategy_door(expand: str) -> Door[Any]:
    """The door behind ``search.strategy``, by ``search.expand``."""
    return ONLINE_RULE if expand == "online" else STRATEGY


VALUE_MODE: Door[Any] = Door(
    field="credit.value_mode",
    options="credit.value_options",
    what="a value mode",
    protocol='docs/extending.md, "Credit"',
    package="atpo_async.core.credit.value_modes",
    attribute="values",
    call=("arrays", "ratio"),
)

ADVANTAGE_MODE: Door[Any] = Door(
    field="credit.advantage_mode",
    options="credit.advantage_options",
    what="an advantage mode",
    protocol='docs/extending.md, "Credit"',
    package="atpo_async.core.credit.advantage_modes",
    attribute="advantages",
    call=("arrays", "values", "root_value"),
)

SURROGATE: Door[Any] = Door(
    field="objective.surrogate",
    options="objective.surrogate_options",
    what="a surrogate",
    protocol='docs/extending.md, "Surrogate"',
    package="learner.loss.surrogates",
    attribute="surrogate",
    hyphens=True,
    call=("tokens", "settings"),
)

TERM: Door[Any] = Door(
    field="objective.terms",
    options_by_name="objective.term_options",
    what="a loss term",
    protocol='docs/extending.md, "Loss term"',
    package="learner.loss.terms",
    attribute="term",
    hyphens=True,
    call=("tokens", "settings"),
)

TOKEN_WEIGHT: Door[Any] = Door(
    field="objective.token_weights",
    options_by_name="objective.token_weight_options",
    what="a token weight",
    protocol='docs/extending.md, "Token weight"',
    package="learner.loss.token_weights",
    attribute="weight",
    hyphens=True,
    call=("tokens", "now", "settings"),
)

CORRECTION: Door[Any] = Door(
    field="correction.action",
    options="correction.action_options",
    what="a correction",
    protocol='docs/extending.md, "Correction"',
    package="learner.loss.corrections",
    attribute="correction",
    call=("ratios", "settings"),
)

SAMPLING: Door[Any] = Door(
    field="buffer.sampling",
    options="buffer.sampling_options",
    what="a sampling",
    protocol='docs/extending.md, "Buffer sampling"',
    package="buffer.sampling",
    attribute="make",
    call=("exponent",),
    parts=("put", "remove", "probability", "draw"),
    plain=("put", "remove", "probability", "draw"),
)

TRANSPORT: Door[Any] = Door(
    field="weights.transport",
    options="weights.transport_options",
    what="a weight transport",
    protocol='docs/extending.md, "Weight transport"',
    built_in={
        "file": "atpo_async.transports.file:FileTransport",
        "chunks": "atpo_async.transports.chunks:ChunkTransport",
    },
    words=("auto",),
    parts=("sender", "receiver"),
    plain=("sender", "receiver"),
)

ENGINE: Door[Any] = Door(
    field="actor.engine",
    options="actor.engine_options",
    what="an engine",
    protocol='docs/extending.md, "Engine"',
    built_in={
        "vllm": "actors.engines.vllm.engine:VllmEngine",
        "transformers": "actors.engines.transformers.engine:TransformersEngine",
    },
    words=("auto",),
    call=("settings",),
    parts=("start", "generate", "swap", "score", "stats", "close"),
    coroutines=("start", "generate", "swap", "score", "close"),
)

LAUNCHER: Door[Any] = Door(
    field="supervisor.launcher",
    options="supervisor.launcher_options",
    what="a launcher",
    protocol='docs/extending.md, "Launcher"',
    built_in={"processes": "atpo_async.ops.launchers.processes:ProcessLauncher"},
    parts=("start", "kill", "usage", "memory_mb"),
    coroutines=("start", "kill"),
    plain=("usage", "memory_mb"),
)

SINK: Door[Any] = Door(
    field="metrics.sinks",
    options_by_name="metrics.options",
    what="a metrics sink",
    protocol='docs/extending.md, "Metrics sink"',
    package="atpo_async.run.sinks.built_in",
    attribute="open_sink",
    call=("run",),
    parts=("write", "close"),
    plain=("write", "close"),
)

DOORS: tuple[Door[Any], ...] = (
    ENVIRONMENT,
    STRATEGY,
    VALUE_MODE,
    ADVANTAGE_MODE,
    SURROGATE,
    TERM,
    TOKEN_WEIGHT,
    CORRECTION,
    SAMPLING,
    TRANSPORT,
    ENGINE,
    LAUNCHER,
    SINK,
)
"""In the order in which a turn passes them, from its task to the metrics."""
