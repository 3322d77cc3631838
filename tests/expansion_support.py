"""Trees for tests of expansion: an engine whose text depends on the context, and trees as content without numbers."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np

from actors.engines.base import Generation, OnRunning, Sampling, Tokens, ignore
from actors.expansion.expansion import Expansion
from actors.search.tree_search import TreeSearch
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT, Turn, TurnTree, VersionSpan
from atpo_async.environments.base import Split, StepResult
from tests.actor_support import STOP, CountingEnvironment, CountingEpisode, ScriptedEngine, ints, lease
from tests.test_search import Sink

VOCAB = 1000
PROMPT = ints(10, 11, 12)
"""Of task 0."""


def settings(**fields: object) -> SearchConfig:
    return SearchConfig.model_validate({"max_action_tokens": 8, **fields})


def hash_of(tokens: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=4).digest(), "big")


class ByContext(ScriptedEngine):
    """Its action and log-probs are a function of the context, and of which one of that context's actions it is: the
    first that no turn has and none under way, whichever actor asks, and whenever.

    Args:
        committed: turns of the tree that there are.
        prompt: of the task.
    """

    def __init__(self, committed: tuple[Turn, ...] = (), prompt: np.ndarray = PROMPT) -> None:
        super().__init__()
        self.given: dict[bytes, set[int]] = {}
        tree = TurnTree("t0", 0, prompt, committed)
        for made in committed:
            seen = np.concatenate([tree.context(made.parent_id), made.observation])
            self.given.setdefault(seen.tobytes(), set()).add(int(made.action[1]) - 500)

    async def generate(
        self, prompt: Tokens, sampling: Sampling, *, request_id: str, on_running: OnRunning = ignore
    ) -> Generation:
        seen = np.asarray(prompt, dtype=np.int32)
        given = self.given.setdefault(seen.tobytes(), set())
        which = next(n for n in itertools.count() if n not in given)
        given.add(which)
        made = await super().generate(prompt, sampling, request_id=request_id, on_running=on_running)
        number = hash_of(np.append(seen, which).astype(np.int32))
        for _ in range(number % 3):
            await asyncio.sleep(0)  # others come first
        action = ints(100 + number % 400, 500 + which, STOP)
        surprise = np.full(3, -(number % 97) / 20 - 0.01, dtype=np.float32)
        return replace(made, token_ids=action, logprobs=surprise, spans=(VersionSpan(0, 0, 3),))


class Uneven(CountingEnvironment):
    """Chains end after 1 to ``turns`` actions, by what was said; a turn finds one of three things."""

    async def start(self, split: Split, task_index: int) -> CountingEpisode:
        self.started += 1
        return UnevenEpisode(self, task_index)


class UnevenEpisode(CountingEpisode):
    said = ints()

    async def step(self, action: np.ndarray) -> StepResult:
        self.said = np.concatenate([self.said, action])
        number = hash_of(self.said)
        result = await super().step(action)
        if number % 5 == 0 and not result.done:
            return replace(result, observation=ints(), done=True, reward=0.5, success=False, end="done")
        return replace(result, fingerprint=(number % 3,), state_value=float(number % 7))


def search_of(
    config: SearchConfig,
    *,
    committed: tuple[Turn, ...] = (),
    sink: Sink | None = None,
    environment: CountingEnvironment | None = None,
    engine: ScriptedEngine | None = None,
    expansion: Expansion | None = None,
    leaving: Callable[[], bool] = lambda: False,
    seed: int = 3,
    kind: str = "train",
) -> TreeSearch:
    return TreeSearch(
        run="r",
        lease=lease(committed=committed, epoch=int(bool(committed)), seed=seed, kind=kind),
        engine=engine or ByContext(committed),
        environment=environment or Uneven(turns=5),
        search=config,
        expansion=expansion or Expansion.of(config, policy_tokens=VOCAB),
        max_context_tokens=200,
        emit=sink if sink is not None else Sink(),
        leaving=leaving,
        clock=lambda: 0.0,
    )


def content(tree: TurnTree) -> Counter[tuple[object, ...]]:
    """Every turn by what stands on its path, without numbers: equal for trees that are the same but for the order in
    which their turns came."""

    def said(turn: Turn) -> tuple[object, ...]:
        return (turn.expansion_round, turn.observation.tobytes(), turn.action.tobytes(), turn.end, turn.reward)

    return Counter(tuple(said(above) for above in tree.path(turn.turn_id)) for turn in tree)


def shaped(tree: TurnTree) -> object:
    """The tree as nested content: what stands under which turn, without numbers."""

    def below(turn_id: int) -> tuple[object, ...]:
        found = [
            (tree[child].expansion_round, tree[child].action.tobytes(), tree[child].end, below(child))
            for child in tree.children(turn_id)
        ]
        return tuple(sorted(found, key=repr))

    return below(ROOT)


def surprising(made: Turn, nats: float, **changes: object) -> Turn:
    """The turn with ``nats`` in all as the surprise of its two tokens."""
    return msgspec.structs.replace(made, logprobs=np.array([-nats / 2, -nats / 2], dtype=np.float32), **changes)
