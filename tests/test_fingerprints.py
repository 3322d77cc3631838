"""Fingerprints of turns: from the environment over the wire into the journal, and to people."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from atpo_async.config import SearchConfig
from atpo_async.core.bounds import MAX_FINGERPRINT
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import ROOT, Turn
from atpo_async.environments.base import StepResult
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.fingerprints import fingerprint_of
from atpo_async.environments.messages.types import ToolCall
from atpo_async.environments.values import Limits, ValueRefused, step_result
from atpo_async.report.conversation import figures
from atpo_async.report.tree_samples import TreeTurn, append_tree_sample, read_tree_samples
from atpo_async.wire import codec
from atpo_async.wire.messages import ActorToBuffer
from buffer.journal import tables
from buffer.journal.journal import Journal
from buffer.trees.index import TurnEntry, places_of
from tests.actor_support import CountingEnvironment, CountingEpisode, ints, turn
from tests.test_search import Sink, search_of

GOES_ON = StepResult(observation=ints(5), done=False, reward=None, success=None, end="continue")
LIMITS = Limits(vocab_size=100)


# --- at the edge ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ((), ()),
        ((4, 2, 4), (4, 2)),
        ([7], (7,)),
        (np.array([3, 1]), (3, 1)),
        ({9, 2}, (2, 9)),
        ((np.int64(5), 2**63 - 1), (5, 2**63 - 1)),
    ],
)
def test_a_fingerprint_is_whole_numbers_each_once(given: object, kept: tuple[int, ...]) -> None:
    found = step_result(replace(GOES_ON, fingerprint=given), "here", LIMITS).fingerprint  # type: ignore[arg-type]
    assert found == kept
    assert {type(part) for part in found} <= {int}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("17", "here: fingerprint is '17' .*; of texts: environments.fingerprints.fingerprint_of"),
        (17, "here: fingerprint is 17 "),
        (["p1"], "here: an id of fingerprint is 'p1' .*of texts: environments.fingerprints.fingerprint_of"),
        ((-1,), "here: an id of fingerprint is -1 "),
        ((2**63,), "here: an id of fingerprint is 9223372036854775808 "),
        ((True,), "here: an id of fingerprint is True "),
        ((0.5,), "here: an id of fingerprint is 0.5 "),
        (range(MAX_FINGERPRINT + 1), "here: fingerprint has 257 ids; expected 256 at most"),
        (None, "here: fingerprint is None "),
    ],
)
def test_what_is_no_fingerprint_is_refused_with_its_value(given: object, said: str) -> None:
    with pytest.raises(ValueRefused, match=said):
        step_result(replace(GOES_ON, fingerprint=given), "here", LIMITS)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [float("nan"), float("inf"), "high", 1e39])
def test_a_states_value_is_a_finite_number(given: object) -> None:
    with pytest.raises(ValueRefused, match="here: state_value is "):
        step_result(replace(GOES_ON, state_value=given), "here", LIMITS)  # type: ignore[arg-type]
    assert step_result(replace(GOES_ON, state_value=float(np.float32(0.5))), "here", LIMITS).state_value == 0.5


def test_ids_of_texts_are_their_numbers_or_their_hashes_and_always_the_same() -> None:
    assert fingerprint_of(["12", 12, "a passage"]) == (12, 7989617790246716211)
    assert fingerprint_of(str(i) for i in range(1000)) == tuple(range(MAX_FINGERPRINT))
    assert all(0 <= found < 2**63 for found in fingerprint_of(["²", "-3", "9" * 19, "9" * 30, "\ud800"]))


# --- into the tree, over the wire, into the journal -----------------------------------------------------------------


class Finds(CountingEpisode):
    async def step(self, action: np.ndarray) -> StepResult:
        return replace(await super().step(action), fingerprint=(self._actions, 70), state_value=0.25)


class Library(CountingEnvironment):
    async def start(self, split: str, task_index: int) -> CountingEpisode:
        return Finds(self, task_index)


async def test_each_turn_has_what_its_own_action_found() -> None:
    config = SearchConfig(initial_rollouts=1, strategy="none", max_action_tokens=8)
    environment = CheckedEnvironment(Library(turns=3), name="library:make", limits=Limits(vocab_size=1000))
    sink = Sink()
    await search_of(environment=environment, emit=sink, config=config).grow()  # type: ignore[arg-type]
    assert [t.fingerprint for t in sink.turns] == [(1, 70), (2, 70), (3, 70)]
    assert {t.state_value for t in sink.turns} == {0.25}


def test_the_wire_holds_a_fingerprint_to_its_limits() -> None:
    sent = turn(1, ROOT, fingerprint=(3, 2**63 - 1), state_value=-1.5)
    back = codec.decode(codec.encode(sent), ActorToBuffer)
    assert (back.fingerprint, back.state_value) == (sent.fingerprint, sent.state_value)
    for fingerprint in ((-1,), tuple(range(MAX_FINGERPRINT + 1))):
        bad = msgspec.structs.replace(sent, fingerprint=fingerprint)
        with pytest.raises(BadMessage, match=r"Turn \(run 'r', .*fingerprint"):
            codec.decode(codec.encode(bad), ActorToBuffer)


def test_a_turn_of_an_earlier_program_has_none() -> None:
    header, payload = codec.encode(turn(1, ROOT))
    known = msgspec.msgpack.decode(header)
    del known["fingerprint"], known["state_value"]
    back: Turn = codec.decode([msgspec.msgpack.encode(known), payload], ActorToBuffer)
    assert (back.fingerprint, back.state_value) == ((), None)


def test_a_pruned_turn_has_no_reward_and_is_no_leaf() -> None:
    pruned = turn(2, 1, end="pruned", fingerprint=(3,))
    assert not pruned.is_leaf
    assert codec.decode(codec.encode(pruned), ActorToBuffer).end == "pruned"
    with pytest.raises(BadMessage, match=r"reward is 1\.0 with end 'pruned'"):
        codec.decode(codec.encode(turn(2, 1, end="pruned", reward=1.0)), ActorToBuffer)


async def test_a_journal_of_the_format_before_opens_with_its_rows_as_they_are(tmp_path: Path) -> None:
    def opened() -> contextlib.AbstractAsyncContextManager[Journal]:
        return Journal(tmp_path, max_bytes=1 << 24, gather_s=0.0)

    async with opened() as journal:
        journal.recover()
        place = journal.add(bytes(16))
        journal.note(TurnEntry(7, 1, 0, 1, 2, 3, 0.5, 0.25, 7, 8, *place, turn_reward=0.75))
        await journal.settle()
        rows = journal.recover().rows
    written = tables.Tables(tmp_path, max_bytes=1 << 24, sync=True, leased=lambda: True)
    with contextlib.closing(written), written._env.begin(write=True) as txn:
        txn.put(tables._META, b"2", db=written._state)
    for _ in range(2):
        async with opened() as journal:
            found = journal.recover().rows
            assert found.tobytes() == rows.tobytes()
            assert [len(record) for record in await journal.load(places_of(found))] == [16]
    written = tables.Tables(tmp_path, max_bytes=1 << 24, sync=True, leased=lambda: True)
    with contextlib.closing(written), written._env.begin(db=written._state) as txn:
        assert txn.get(tables._META) == b"3"


# --- built-in tasks -------------------------------------------------------------------------------------------------


async def test_a_tool_tasks_fingerprint_is_the_lines_that_its_tools_said() -> None:
    from atpo_async.environments.data.task_data import TaskData
    from atpo_async.environments.messages.types import Action
    from atpo_async.environments.rewards.functions import AT_THE_END, reward_functions
    from atpo_async.environments.tools.calls import ToolCalls
    from atpo_async.environments.tools.conversation import Conversation, Rules
    from atpo_async.environments.tools.counts import Counts
    from atpo_async.environments.tools.tool import as_tools, tool

    @tool(read_only=True)
    def search(query: str) -> str:
        """Search."""
        return f"Oslo: in Norway\n\nabout {query}"

    def correct(answer: str) -> float:
        return 1.0

    def uncut(text: str, max_tokens: int, notice: str = "") -> str:
        return text

    calls = ToolCalls(
        as_tools([search]), cut=uncut, counts=Counts(), timeout_s=5.0, error_text="{error}"
    )  # fmt: skip
    rules = Rules(
        calls=calls, rewards=reward_functions([correct], field="rewards", known=AT_THE_END, needed=True),
        turn_rewards=(), system=None, max_turns=3, success_at=None, extract=str, reward_timeout_s=5.0,
    )  # fmt: skip
    row = TaskData.load([{"question": "Where?", "answer": "Oslo"}]).task("train", 0)

    async def found(*queries: str) -> tuple[int, ...]:
        asked = tuple(
            ToolCall(id=f"c{at}", name="search", arguments={"query": query}, raw="") for at, query in enumerate(queries)
        )
        conversation = Conversation(rules, row, "train", 0)
        said = await conversation.reply(Action(ids=ints(1), content="", thinking="", tool_calls=asked))
        return tuple(said.fingerprint)

    assert await found("Bergen") == fingerprint_of(["Oslo: in Norway", "about Bergen"])
    assert set(await found("Bergen")) & set(await found("Paris")) == set(fingerprint_of(["Oslo: in Norway"]))


# --- for people -----------------------------------------------------------------------------------------------------


def test_atpo_trees_shows_what_a_turn_found(tmp_path: Path) -> None:
    shown = TreeTurn(
        id=1, parent=0, entropy=0.5, value=None, reward=None, action="a", observation="", round=0, versions=(3,),
        fingerprint=(12, 7, *fingerprint_of(["a passage"]), 1, 2, 3, 4),
    )  # fmt: skip
    assert "found 12 7 …716211 1 2 and 2 more" in figures(shown)
    file = tmp_path / "trees.jsonl"
    append_tree_sample(file, tree_id="t", step=1, version=3, prompt="p", turns=[shown])
    assert read_tree_samples(file)[0].turns[0].fingerprint == shown.fingerprint
