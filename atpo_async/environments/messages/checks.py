"""Rules for what a task in messages hands over: converted where nothing is lost, else refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atpo_async.core.texts import of_type, of_value
from atpo_async.environments.messages.types import Message, Reply
from atpo_async.environments.values import ValueRefused, reading, refuse, truth_of

ROLES = ("system", "developer", "user", "assistant", "tool")

_A_REPLY = (
    'Reply(messages=[{"role": "tool", "content": …}]) to go on, or Reply(done=True, reward=…) at the end, of '
    "atpo_async.environments.messages.types"
)
_A_MESSAGE = 'a message: {"role": "user", "content": "…"}'
_TEXT = "a text"


def reply_of(said: Any, where: str) -> Reply:
    """What ``reply()`` returned, its messages as ``messages_of`` gives them.  Raises ValueRefused.

    Reward, success, the rewards' parts, fingerprint and state value are checked with the step's result
    (``environments/values.py``).
    """
    field = "what reply() returned"
    if not isinstance(said, Reply):
        hint = "" if said is not None else "; a reply without return returns None"
        raise refuse(where, field, said, f"a Reply: {_A_REPLY}{hint}")
    messages = messages_of(said.messages, "messages", where, answers=True)
    done, turn_limit = truth_of(said.done, "done", where), truth_of(said.turn_limit, "turn_limit", where)
    if done and messages:
        raise ValueRefused(
            "messages", f"{where}: messages has {len(messages)}, though done is True: the policy would never see them"
        )
    if not done and not messages:
        raise ValueRefused(
            "messages",
            f"{where}: messages is empty and done is False, so the policy has nothing to answer: {_A_REPLY}",
        )
    return Reply(
        messages=messages,
        done=done,
        reward=said.reward,
        success=said.success,
        turn_reward=said.turn_reward,
        rewards=said.rewards,
        turn_limit=turn_limit,
        fingerprint=said.fingerprint,
        state_value=said.state_value,
    )


def messages_of(value: Any, field: str, where: str, *, answers: bool) -> list[Message]:
    """Messages with their content as text.

    A text alone is one message of the user, and one message alone is a list of it.

    Args:
        value: what the task handed over.
        field: what it is called.
        where: class, task and step.
        answers: to an action of the policy, whose own role they then cannot have; else they open the conversation.

    Raises:
        ValueRefused: it names the message and its key.
    """
    if answers and type(value) in (list, tuple) and all(map(_is_plain, value)):
        return list(value)
    with reading(where, field, value):
        if isinstance(value, str):
            value = [{"role": "user", "content": value}]
        elif isinstance(value, dict):
            value = [value]
        if isinstance(value, bytes | bytearray) or not isinstance(value, Sequence):
            raise refuse(where, field, value, f"a list of messages, each {_A_MESSAGE}")
        messages = [_message(one, f"{field}[{at}]", where, answers) for at, one in enumerate(value)]
    if answers:
        return messages
    if not messages:
        raise ValueRefused(field, f"{where}: {field} is empty; expected at least {_A_MESSAGE}")
    if messages[-1]["role"] == "assistant":
        raise ValueRefused(
            field,
            f"{where}: {field} ends with a message of the assistant; expected one of a user, for the policy to answer",
        )
    return messages


def _is_plain(message: Any) -> bool:
    """Whether a message is as it has to be, beyond doubt: nearly all are."""
    if type(message) is not dict or message.get("role") not in ("tool", "user"):
        return False
    content = message.get("content")
    return (
        type(content) is str
        and content.isascii()
        and all(type(message.get(key, "")) is str for key in ("name", "tool_call_id"))
    )


def _message(value: Any, field: str, where: str, answers: bool) -> Message:
    if not isinstance(value, dict):
        raise refuse(where, field, value, _A_MESSAGE)
    role = value.get("role")
    if role not in ROLES:
        hint = "; a tool's answer has the role 'tool'" if role in ("function", "ipython", "observation") else ""
        raise refuse(where, f"{field}['role']", role, f"one of {', '.join(ROLES)}{hint}")
    if answers and role == "assistant":
        raise ValueRefused(
            field,
            f"{where}: {field} has the role 'assistant', which only the policy speaks in; expected 'tool' or 'user'",
        )
    message = {**value, "content": _content(value.get("content"), f"{field}['content']", where)}
    for key in ("name", "tool_call_id"):
        if message.get(key) is None:
            message.pop(key, None)
        elif not isinstance(message[key], str):
            raise refuse(where, f"{field}[{key!r}]", message[key], _TEXT)
    return message


def _content(value: Any, field: str, where: str) -> str:
    """A text; of parts, their texts one after another; empty for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _encodable(str(value), field, where)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return "".join(_part(part, f"{field}[{at}]", where) for at, part in enumerate(value))
    how = "json.dumps(…) of it" if isinstance(value, dict | tuple | set) else "str(…) of it"
    raise refuse(where, field, value, f"{_TEXT}, None, or a list of parts: {how}")


def _part(value: Any, field: str, where: str) -> str:
    if isinstance(value, str):
        return _encodable(str(value), field, where)
    if isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str):
        return _encodable(str(value["text"]), field, where)
    if isinstance(value, dict) and "type" in value:
        raise ValueRefused(
            field, f"{where}: {field} is of type {of_value(value['type'])}; policies here read text alone: "
            '{"type": "text", "text": "…"}',
        )  # fmt: skip
    raise refuse(where, field, value, '{"type": "text", "text": "…"}')


def _encodable(text: str, field: str, where: str) -> str:
    """Raises ValueRefused for half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ValueRefused(
            field,
            f"{where}: {field} ({of_type(text)}) has half of a surrogate pair at character {exc.start}, which is no "
            "text: decode it with errors='replace'",
        ) from exc
    return text
