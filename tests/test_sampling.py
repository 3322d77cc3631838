"""``buffer.sampling``: the built-in samplers, one of a user's, and what is not taken from one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_async.config import build
from atpo_async.core.errors import AtpoError, ConfigError, SetupError
from atpo_async.wire.messages import Batch, Refused, Trained
from buffer.pool.checked import CheckedSampler, SamplerFault, sampler_of
from buffer.pool.pool import ReplayPool
from buffer.pool.sampler import F64, I64, Sampler
from buffer.sampling.prioritized import Prioritized
from buffer.sampling.uniform import Uniform
from buffer.state import BufferState
from tests.buffer_peers_support import SOON_S, ask, configured, grown, published, running, stateful, take
from tests.test_buffer_replay import ids, rng, tree
from tests.test_buffer_restore import Life, config_of

EXAMPLE = '''
import numpy as np


class Ranked:
    """P_i in proportion to 1 / rank^power, rank 1 for the highest priority."""

    def __init__(self, exponent, power=None):
        self.power = exponent if power is None else power
        self.priority = {}

    def put(self, trees, priorities):
        self.priority.update(zip(trees.tolist(), priorities.tolist()))

    def remove(self, trees):
        for tree in trees.tolist():
            del self.priority[tree]

    def probability(self, trees):
        ranked = sorted(self.priority, key=self.priority.get, reverse=True)
        weight = {tree: rank**-self.power for rank, tree in enumerate(ranked, start=1)}
        return np.array([weight[tree] for tree in trees.tolist()]) / sum(weight.values())

    def draw(self, count, first, rng):
        free = np.array([tree for tree in self.priority if tree not in set(first.tolist())])
        share = self.probability(free)
        chosen = np.concatenate([first, rng.choice(free, count, replace=False, p=share / share.sum())])
        probability = self.probability(chosen)
        self.remove(chosen)
        return chosen, probability
'''
"""As in docs/extending.md."""


@pytest.fixture
def ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a sampler that lies outside the packages."""
    (tmp_path / "ranked_of_this_test.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "ranked_of_this_test:Ranked"
    sys.modules.pop("ranked_of_this_test", None)


def section(name: str, **options: Any) -> Any:
    return build({"buffer": {"sampling": name, "sampling_options": options}}).buffer


def pool(sampler: Sampler | None, **settings: Any) -> ReplayPool:
    return ReplayPool(**({"max_uses": 10**6, "max_lag": 8, "exponent": 0.6, "sampler": sampler} | settings))


def filled(sampler: Sampler | None, priorities: list[float], **settings: Any) -> ReplayPool:
    """Trees ``t0``, ``t1``, … of these priorities, each of which has been served once."""
    made = pool(sampler, **settings)
    for i in range(len(priorities)):
        made.add(tree(f"t{i}"), priority=1.0)
    names = ids(made.draw(len(priorities), rng=rng(), beta=0.0))
    made.confirm(names, {f"t{i}": priority for i, priority in enumerate(priorities)})
    return made


# --- built-in ------------------------------------------------------------------------------------------------------


def test_uniform_draws_each_tree_as_often_with_probability_one_in_n_and_weight_one() -> None:
    made = filled(Uniform(), [0.1, 5.0, 1.0, 0.0])
    counts: Counter[str] = Counter()
    generator = rng()
    for _ in range(1000):
        drawn = made.draw(2, rng=generator, beta=0.7)
        assert [(each.probability, each.weight) for each in drawn] == [(0.25, 1.0)] * 2
        counts.update(ids(drawn))
        made.give_back(ids(drawn))
    assert counts == pytest.approx(dict.fromkeys(["t0", "t1", "t2", "t3"], 500), abs=60)


@pytest.mark.parametrize("over", ["max", "mean", "none"])
def test_the_weights_of_uniform_are_one_whatever_they_are_divided_by(over: str) -> None:
    made = filled(Uniform(), [0.1, 5.0, 1.0], weights_over=over)
    assert [each.weight for each in made.draw(2, rng=rng(), beta=1.0)] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("make", [lambda: Uniform(), lambda: Prioritized(0.6)], ids=["uniform", "prioritized"])
def test_a_built_in_sampler_agrees_with_a_plain_set_of_trees(make: Any) -> None:
    """Puts, removals and draws in any order: nothing is drawn that is not there, nothing twice."""
    sampler, generator, there = CheckedSampler(make(), "built in"), np.random.default_rng(7), set[int]()
    for _ in range(400):
        event = generator.integers(3)
        if event == 0 or len(there) < 12:
            trees = np.unique(generator.integers(0, 3 * (len(there) + 8), 6))
            sampler.put(trees, generator.random(len(trees)))
            there |= set(trees.tolist())
        elif event == 1:
            gone = generator.permutation(np.array(sorted(there)))[:3]
            sampler.remove(gone)
            there -= set(gone.tolist())
        else:
            first = generator.permutation(np.array(sorted(there)))[: generator.integers(3)]
            everyone = np.array(sorted(there))
            before = dict(zip(everyone.tolist(), sampler.probability(everyone).tolist(), strict=True))
            drawn, probability = sampler.draw(4, first, generator)
            assert probability.tolist() == pytest.approx([before[t] for t in drawn.tolist()])
            there -= set(drawn.tolist())


@pytest.mark.parametrize("name", ["prioritized", "uniform"])
def test_a_built_in_sampler_comes_in_by_its_name(name: str) -> None:
    assert type(sampler_of(section(name))).__name__ == name.capitalize()


@pytest.mark.parametrize("name", ["prioritized", "uniform"])
def test_what_would_expire_unserved_is_in_the_batch_whatever_is_drawn(name: str) -> None:
    made = pool(sampler_of(section(name)), max_lag=1)
    for i in range(40):
        made.add(tree(f"new{i}", 1), priority=1.0)
    for i in range(3):
        made.add(tree(f"old{i}", 0), priority=1.0)
    made.advance(1)
    drawn = made.draw(4, rng=rng(), beta=0.4)
    # All that expire now, and of the 40 that expire at the next version all that would not fit into that batch.
    assert {"old0", "old1", "old2"} < set(ids(drawn))
    assert [each.probability for each in drawn] == pytest.approx([1 / 43] * 4)


@pytest.mark.parametrize("seed", range(3))
def test_with_uniform_every_task_is_trained_on_as_often_as_intended_whoever_starts_again(seed: int) -> None:
    life = Life(config_of(2, partial=False, sampling="uniform"), seed).live(500).finish()
    assert Counter(task for batch in life.lineage for task, _, _ in batch) == dict.fromkeys(range(12), 2)


# --- a user's own --------------------------------------------------------------------------------------------------


def test_a_sampler_from_outside_draws_from_a_pool_and_its_weights_are_those_of_its_probabilities(ranked: str) -> None:
    made = filled(sampler_of(section(ranked, power=1.0)), [0.5, 3.0, 1.0, 2.0])
    by_rank = dict(zip(["t1", "t3", "t2", "t0"], (np.array([1, 1 / 2, 1 / 3, 1 / 4]) * 12 / 25).tolist(), strict=True))
    for _ in range(20):
        drawn = made.draw(2, rng=rng(), beta=0.5)
        p = np.array([each.probability for each in drawn])
        assert p.tolist() == pytest.approx([by_rank[each.tree.tree_id] for each in drawn])
        weights = (4 * p) ** -0.5
        assert [each.weight for each in drawn] == pytest.approx((weights / weights.max()).tolist())
        made.give_back(ids(drawn))


def test_a_sampler_from_outside_serves_a_whole_buffer(ranked: str) -> None:
    state = stateful(configured(buffer={"sampling": ranked}, staleness={"trees_per_batch": 2, "max_lag": 4}))
    seen: list[str] = []
    for step in range(5):
        while len(state.pool) < 5:
            for lease in state.lease("a", 1, 0.0).leases:
                take(state, grown(lease, version=step))
        batch = state.sample(ask(step, step), 0.0)
        assert isinstance(batch, Batch)
        seen += [each.tree_id for each in batch.trees]
        assert all(0 < each.probability < 1 for each in batch.trees)
        state.publish(published(step + 1))
        state.trained(Trained(run="r", batch_id=batch.batch_id, version=step + 1, priorities={}))
    assert len(seen) == len(set(seen)) == 10
    assert state.pool.left["stale"] == 0


# --- faults --------------------------------------------------------------------------------------------------------


class Lost(Prioritized):
    """Fails when the third of a pool's trees comes."""

    def put(self, trees: I64, priorities: F64) -> None:
        if 2 in trees.tolist() and len(trees) == 1:
            raise KeyError("no place")
        super().put(trees, priorities)


def test_a_sampler_that_fails_over_a_new_tree_fails_the_draw_and_not_the_turn_that_brought_it() -> None:
    state = stateful(configured(buffer={"sampling": f"{__name__}:Lost"}, staleness={"max_lag": 4}))
    for lease in state.lease("a", 3, 0.0).leases:
        take(state, grown(lease))
    assert len(state.pool) == 3
    for _ in range(2):
        with pytest.raises(SamplerFault, match="Lost': put failed: KeyError: 'no place'"):
            state.sample(ask(num_trees=2), 0.0)


class Faulty(Prioritized):
    """Draws what it should, and then, of at least so many trees, something is changed about it."""

    def __init__(self, exponent: float, fault: str = "", least: int = 0) -> None:
        super().__init__(exponent)
        self.fault, self.least = fault, least

    def draw(self, count: int, first: I64, rng: np.random.Generator) -> Any:
        trees, p = super().draw(count, first, rng)
        return (trees, p) if len(trees) < self.least else self.changed(trees, p, count)

    def changed(self, trees: I64, p: F64, count: int) -> Any:
        match self.fault:
            case "twice":
                return np.append(trees[:-1], trees[0]) if count == len(trees) else trees[[*range(len(trees) - 1), 0]], p
            case "unknown":
                return np.append(trees[:-1], 99), p
            case "few":
                return trees[:-1], p[:-1]
            case "floats":
                return trees + 0.5, p
            case "backwards":
                return trees[::-1], p[::-1]
            case "zero":
                return trees, np.append(p[:-1], 0.0)
            case "nan":
                return trees, np.append(p[:-1], np.nan)
            case "over one":
                return trees, np.full(len(p), 0.9)
            case "words":
                return trees, ["likely"] * len(p)
            case "one":
                return trees
            case "raises":
                raise RuntimeError("no rank")
        raise AssertionError(self.fault)


FAULTS = {
    "twice": r"draw drew tree \d twice",
    "unknown": "draw drew tree 99, which cannot be drawn",
    "few": "draw drew int64\\[2\\], 2 trees beside the 1 that have to be drawn were asked for",
    "floats": "draw drew float64",
    "backwards": r"first, which had to be \[4\]",
    "zero": r"draw has probability 0, which is not in \(0, 1\]",
    "nan": r"draw has probability nan, which is not in \(0, 1\]",
    "over one": "draw has probabilities that sum to 2.7, over 1, of different trees",
    "words": "draw has probabilities that are no numbers",
    "one": r"draw returned ndarray, not \(trees, probabilities\)",
    "raises": "draw failed: RuntimeError: no rank",
}
NAME = f"{__name__}:Faulty"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_sampler_ends_the_buffer_before_the_run_and_is_named(fault: str) -> None:
    with pytest.raises(SetupError, match=FAULTS[fault]) as caught:
        BufferState(
            configured(buffer={"sampling": NAME, "sampling_options": {"fault": fault}}), run="r", rng=rng(), now=0.0
        )
    assert str(caught.value).startswith(f"buffer.sampling = '{NAME}': draw ")
    assert isinstance(caught.value, AtpoError)  # exit code 2


def test_a_sampler_that_lacks_a_method_or_takes_no_option_ends_the_buffer_before_the_run() -> None:
    with pytest.raises(ConfigError, match="a sampling is called as"):
        sampler_of(section("buffer.state:BufferState"))
    with pytest.raises(ConfigError, match="unexpected keyword argument 'speed'"):
        sampler_of(section(NAME, speed=2))
    with pytest.raises(ConfigError, match="float is not a sampling: it lacks put, remove, probability, draw"):
        sampler_of(section("builtins:float"))


def test_a_sampler_that_fails_later_fails_the_request_and_the_next_one_finds_every_tree() -> None:
    config = configured(
        buffer={"sampling": NAME, "sampling_options": {"fault": "raises", "least": 4}}, staleness={"max_lag": 4}
    )
    state = stateful(config)
    for _ in range(5):
        for lease in state.lease("a", 1, 0.0).leases:
            take(state, grown(lease))
    with pytest.raises(SamplerFault, match=r"buffer\.sampling = .*: draw failed: RuntimeError: no rank"):
        state.sample(ask(num_trees=4), 0.0)
    assert (len(state.pool), state.pool.num_out) == (5, 0)


async def test_the_learner_hears_in_one_line_why_its_batch_cannot_be_drawn() -> None:
    options = {"fault": "raises", "least": 4}
    config = configured(buffer={"sampling": NAME, "sampling_options": options}, staleness={"max_lag": 4})
    async with running(config) as peers:
        await peers.tell(published())
        for lease in await peers.leases(5):
            await peers.send(*grown(lease))
        answer = await peers.learner.request(ask(num_trees=4), timeout_s=SOON_S)
        assert isinstance(answer, Refused)
        assert f"buffer.sampling = '{NAME}': draw failed: RuntimeError: no rank; see docs" in answer.reason
