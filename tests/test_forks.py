"""A branch forks off where its tree was, and nowhere else: each replayed observation is held to the recorded one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from actors.faults.fault import Fault
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT
from atpo_async.environments.base import ForkDiverged, Split, StepResult
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.replay import CannotReplay, Past, PastTurn, replayed
from atpo_async.environments.values import Limits
from tests.actor_support import CountingEnvironment, CountingEpisode, ints, leaf, turn
from tests.test_search import Sink, keep_in, search_of

SEEN = (ints(21), ints(22), ints(23))
"""What a CountingEpisode shows after its first actions."""


def past(*observations: np.ndarray | None, prompt: np.ndarray | None = None) -> Past:
    return Past(tuple(PastTurn(ints(5, i), shown) for i, shown in enumerate(observations)), prompt)


class Recalls(CountingEpisode):
    """Its replay runs no tool: it takes what was recorded."""

    recalled = 0

    async def replay_step(self, action: np.ndarray, observation: np.ndarray) -> StepResult:
        self.recalled += 1
        self._actions += 1
        return StepResult(observation=observation, done=False, reward=None, success=None, end="continue")


class World(CountingEnvironment):
    """CountingEnvironment with episodes of another kind, which are all kept here."""

    def __init__(self, kind: type[CountingEpisode], turns: int = 4) -> None:
        super().__init__(turns=turns)
        self.kind = kind
        self.episodes: list[CountingEpisode] = []

    async def start(self, split: Split, task_index: int) -> CountingEpisode:
        self.started += 1
        self.episodes.append(self.kind(self, task_index))
        return self.episodes[-1]


def checked(plain: CountingEnvironment) -> CheckedEnvironment:
    return CheckedEnvironment(plain, name="world:make", limits=Limits(vocab_size=1000))


async def test_a_replay_ends_where_its_path_does_with_the_observation_that_follows() -> None:
    episode, observation = await replayed(checked(CountingEnvironment(turns=4)), "train", 3, past(*SEEN))
    assert observation.tolist() == [23]
    assert episode.prompt.tolist() == [10, 11, 15]
    assert (await episode.step(ints(9))).done


@pytest.mark.parametrize("step", [1, 2, 3])
async def test_any_observation_that_differs_ends_the_replay_with_what_and_where(step: int) -> None:
    recorded = [*SEEN]
    recorded[step - 1] = ints(20 + step, 7, 8)
    plain = CountingEnvironment(turns=4)
    with pytest.raises(ForkDiverged) as caught:
        await replayed(checked(plain), "train", 3, past(*recorded), name="world:make")
    assert str(caught.value).startswith(
        f"environment 'world:make', task 3 (train), step {step}: replayed, the observation (1 token) differs from the "
        f"recorded one (3) from token 1 on: [{20 + step}] in place of [{20 + step}, 7, 8]; the same split, index and "
        "actions must give the same: seed what is random by them, keep what a tool answered"
    )
    assert (plain.started, plain.closed) == (1, 1)


async def test_what_differs_is_shown_as_text_where_the_environment_decodes() -> None:
    class Decodes(CountingEnvironment):
        def decode(self, ids: np.ndarray) -> str:
            return " ".join(f"w{i}" for i in ids.tolist())

    with pytest.raises(ForkDiverged, match="'w22' in place of 'w22 w7'"):
        await replayed(checked(Decodes(turns=4)), "train", 0, past(ints(21), ints(22, 7)))


async def test_an_episode_that_ends_before_its_path_does_has_diverged() -> None:
    with pytest.raises(ForkDiverged, match=r"step 2: replayed, the episode ended \(done\), and its tree went on"):
        await replayed(checked(CountingEnvironment(turns=2)), "train", 0, past(*SEEN))


async def test_another_prompt_is_found_before_any_tool_runs() -> None:
    plain = World(CountingEpisode)
    with pytest.raises(ForkDiverged, match=r"the prompt .* differs") as caught:
        await replayed(checked(plain), "train", 0, past(*SEEN, prompt=ints(10, 12)))
    assert caught.value.field == "prompt"
    assert plain.episodes[0]._actions == 0


async def test_an_episode_that_takes_recorded_observations_is_handed_them_and_runs_no_tool() -> None:
    plain = World(Recalls)
    _, observation = await replayed(checked(plain), "train", 0, past(ints(1), ints(2), None))
    (episode,) = plain.episodes
    assert isinstance(episode, Recalls)
    assert (episode.recalled, episode._actions) == (2, 3)
    assert observation.tolist() == [23], "what was never recorded is asked of the tools"


async def test_what_replay_step_returns_is_checked_like_any_step() -> None:
    class Wrong(Recalls):
        async def replay_step(self, action: np.ndarray, observation: np.ndarray) -> StepResult:
            return replace(await super().replay_step(action, observation), observation=ints(4))

    with pytest.raises(ForkDiverged, match=r"\[4\] in place of \[21\]"):
        await replayed(checked(World(Wrong)), "train", 0, past(*SEEN))


async def test_an_environment_that_replays_by_itself_is_held_to_its_last_observation() -> None:
    replays: list[int] = []

    class Own(World):
        async def replay(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> CountingEpisode:
            replays.append(len(actions))
            episode = await self.start(split, task_index)
            episode._actions = len(actions)
            return episode

    def own() -> CheckedEnvironment:
        return checked(Own(CountingEpisode))

    assert (await replayed(own(), "train", 0, past(ints(7), ints(8), ints(23)))).observation.tolist() == [23]
    assert replays == [2]
    with pytest.raises(ForkDiverged, match="step 3: replayed, the observation"):
        await replayed(own(), "train", 0, past(*SEEN[:2], ints(9)))


async def test_an_environment_without_a_replay_says_so() -> None:
    class Never(CountingEnvironment):
        replay = None  # type: ignore[assignment]

    with pytest.raises(CannotReplay, match="the environment's replay is None, and no snapshot"):
        await replayed(checked(Never()), "train", 0, past(*SEEN))


class WaversInTheMiddle(CountingEpisode):
    """Another first observation in each episode; all later ones are the same."""

    async def step(self, action: np.ndarray) -> StepResult:
        said = await super().step(action)
        return said if said.done or self._actions > 1 else replace(said, observation=ints(self._environment.started))


async def test_a_branch_is_left_out_for_an_observation_in_the_middle_of_its_path() -> None:
    """Two actors grew this tree; the second one's episodes differ before the turn that it forks at."""
    first = (
        turn(1, ROOT),
        turn(2, 1, observation=ints(77)),
        leaf(3, 2, observation=ints(22)),
        turn(4, 2, observation=ints(22), expansion_round=1),
    )
    sink = Sink()
    faults: list[Fault] = []
    config = SearchConfig(initial_rollouts=1, rounds=1, branches=1, max_action_tokens=8)
    environment = World(WaversInTheMiddle)
    await search_of(
        environment=environment, emit=sink, config=config, committed=first, epoch=1, chain_ended=keep_in(faults)
    ).grow()
    assert sink.closed.failures == {"fork_diverged": 1}
    assert "step 1: replayed, the observation (1 token) differs" in faults[0].detail
    assert environment.started == environment.closed
