"""A tree's conversation as lines of text for a terminal and for the report: roles, tool calls, rewards, versions.

Pure: a sample in, lines or a ``rich`` tree out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Group
from rich.text import Text
from rich.tree import Tree

from atpo_async.core.texts import counted
from atpo_async.core.tree import ROOT
from atpo_async.environments.messages.types import Shown
from atpo_async.report.tree_samples import TreeSample, TreeTurn

STYLES = {
    "system": "dim",
    "user": "cyan",
    "assistant": "bold",
    "tool": "yellow",
    "prompt": "cyan",
    "action": "bold",
    "observation": "yellow",
}


def headline(sample: TreeSample) -> str:
    """``tree 17, step 4 (version 3), task 57: 6 leaves, rewards 0 to 1``."""
    task = "" if sample.task is None else f", task {sample.task}"
    of = f" of {sample.environment}" if sample.environment else ""
    return (
        f"tree {sample.tree_id}, trained on at step {sample.step} (version {sample.version}){task}{of}: "
        f"{counted(len(sample.turns), 'turn')}, {counted(len(sample.leaves), 'leaf', 'leaves')}{rewards_of(sample)}"
    )


def rewards_of(sample: TreeSample) -> str:
    """``, rewards 0 to 1``; empty without leaves."""
    rewards = [turn.reward for turn in sample.leaves if turn.reward is not None]
    if not rewards:
        return ""
    low, high = min(rewards), max(rewards)
    return f", reward {low:g}" if low == high else f", rewards {low:g} to {high:g}"


def figures(turn: TreeTurn) -> str:
    """``turn 4 · branch of round 1 · v3→v4 · H 0.31 · V +0.52 · reward 1 (correct 1, brief 0.5), done``."""
    parts = [f"turn {turn.id}"]
    if turn.round:
        parts.append(f"round {turn.round}")
    if turn.versions:
        parts.append("→".join(f"v{version}" for version in turn.versions))
    parts.append(f"H {turn.entropy:.2f}")
    if turn.value is not None:
        parts.append(f"V {turn.value:+.2f}")
    if turn.turn_reward:
        parts.append(f"turn reward {turn.turn_reward:g}")
    if turn.fingerprint:
        parts.append(f"found {_few(turn.fingerprint)}")
    if turn.reward is not None:
        named = ", ".join(f"{name} {value:g}" for name, value in turn.rewards.items())
        end = f", {turn.end.replace('_', ' ')}" if turn.end not in ("", "done") else ""
        parts.append(f"reward {turn.reward:g}" + (f" ({named})" if named else "") + end)
    return " · ".join(parts)


MOST_FOUND = 5
"""Ids of a fingerprint that are shown."""


def _few(fingerprint: Sequence[int]) -> str:
    """Its first ids, large ones by their last six digits: they are hashes of texts."""
    shown = " ".join(str(found) if found < 10**8 else f"…{found % 10**6:06d}" for found in fingerprint[:MOST_FOUND])
    more = len(fingerprint) - MOST_FOUND
    return shown + (f" and {more} more" if more > 0 else "")


def prompt_of(sample: TreeSample) -> tuple[Shown, ...]:
    """The prompt as messages; text that the tokens do not divide is one of role ``prompt``."""
    return _of_role("prompt", sample.messages or (Shown(role="", text=sample.prompt),))


def heard_by(turn: TreeTurn) -> tuple[Shown, ...]:
    """The observation as messages; none for a first turn."""
    found = turn.heard or ((Shown(role="", text=turn.observation),) if turn.observation else ())
    return _of_role("observation", found)


def said_in(turn: TreeTurn) -> Shown:
    """The action as a message."""
    return _of_role("action", (turn.said or Shown(role="", text=turn.action),))[0]


def _of_role(role: str, messages: Sequence[Shown]) -> tuple[Shown, ...]:
    """With ``role`` where the tokens tell none."""
    return tuple(message if message.role else replace(message, role=role) for message in messages)


def lines_of(message: Shown) -> Iterator[tuple[str, str]]:
    """(kind, text) of each part of a message: its thinking, its text, each of its tool calls."""
    role = message.role
    if message.thinking:
        yield f"{role} thinks", message.thinking
    if message.text.strip() or not (message.thinking or message.tool_calls):
        yield role, message.text
    for call in message.tool_calls:
        yield f"{role} calls", call


def branches(sample: TreeSample) -> dict[int, list[TreeTurn]]:
    """Parent -> its turns, in order."""
    children: dict[int, list[TreeTurn]] = {ROOT: []}
    for turn in sample.turns:
        children.setdefault(turn.parent, []).append(turn)
    return children


def as_tree(sample: TreeSample) -> Tree:
    """The whole tree for a terminal: the prompt, and below every turn those that follow it.

    An observation that siblings share is shown once, above the first of them.
    """
    root = Tree(Group(Text(headline(sample), style="bold underline"), *map(_message, prompt_of(sample))))
    children = branches(sample)
    waiting = [(ROOT, root)]
    while waiting:
        parent, node = waiting.pop()
        below = children.get(parent, [])
        heard: tuple[Shown, ...] = ()
        for turn in below:
            shown = [] if heard_by(turn) == heard else [_message(message) for message in heard_by(turn)]
            heard = heard_by(turn)
            good = turn.reward is not None and turn.reward > 0
            style = "green" if good else "red" if turn.reward is not None else "dim"
            branch = node.add(Group(*shown, _message(said_in(turn)), Text(figures(turn), style=style)))
            waiting.append((turn.id, branch))
    return root


def _message(message: Shown) -> Text:
    text = Text()
    for at, (kind, words) in enumerate(lines_of(message)):
        text.append(("\n" if at else "") + f"{kind}: ", style="magenta")
        style = "dim italic" if kind.endswith("thinks") else STYLES.get(message.role, "")
        text.append(words.strip("\n"), style=style)
    return text


def chain_to(sample: TreeSample, leaf: TreeTurn) -> list[TreeTurn]:
    """The turns from the first down to ``leaf``."""
    by_id = {turn.id: turn for turn in sample.turns}
    found = [leaf]
    while found[-1].parent != ROOT:
        found.append(by_id[found[-1].parent])
    return found[::-1]


def best_and_worst(sample: TreeSample) -> list[TreeTurn]:
    """The leaves with the highest and the lowest reward; one where all are equal, none without leaves."""
    leaves = sample.leaves
    if not leaves:
        return []
    high = max(leaves, key=lambda turn: turn.reward or 0.0)
    low = min(leaves, key=lambda turn: turn.reward or 0.0)
    return [high] if high.reward == low.reward else [high, low]


def transcript_lines(sample: TreeSample, leaf: TreeTurn) -> Sequence[tuple[str, str]]:
    """(kind, text) of one whole conversation, from the prompt to ``leaf``; figures of a turn are of kind ``turn``."""
    found = [line for message in prompt_of(sample) for line in lines_of(message)]
    for turn in chain_to(sample, leaf):
        for message in (*heard_by(turn), said_in(turn)):
            found += lines_of(message)
        found.append(("turn", figures(turn)))
    return found
