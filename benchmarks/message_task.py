"""The demo's task in messages: the same questions, facts and token ids as hopqa's, through the message layer.

Its chat template writes exactly the tokens of the token protocol, so that what it costs is the layer and nothing else.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atpo_async.core.vocabulary import Split
from atpo_async.environments import MessageEpisode, MessageTask, Reply
from atpo_async.environments.hopqa.environment import HopQA, HopQAEpisode
from atpo_async.environments.hopqa.world import END, Answer, Look, read_action
from atpo_async.environments.messages.types import Action, Message

TEMPLATE = (
    "{%- for m in messages %}"
    "{{- m.content if m.role == 'user' else m.content + ' <end>' if m.role == 'assistant' "
    "else ' <obs> ' + m.content + ' </obs>' }}"
    "{%- endfor %}"
)

SPENT: dict[str, list[float]] = defaultdict(list)
"""Name of a method of the layer -> seconds of each call."""


def with_template(model: Path, folder: Path) -> Path:
    """A copy of the demo's policy whose tokenizer has a chat template."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


class HopQAInMessages(MessageTask):
    """hopqa, its observations as messages of a tool."""

    def __init__(self, tokenizer: Path | str, **options: Any) -> None:
        super().__init__(tokenizer)
        self._plain = HopQA(tokenizer, **options)
        for name in ("parse", "extend", "render"):
            setattr(self.format, name, timed(name, getattr(self.format, name)))

    def num_tasks(self, split: Split) -> int | None:
        return self._plain.num_tasks(split)

    async def begin(self, split: Split, index: int) -> MessageEpisode:
        return Asked(await self._plain.start(split, index))


class Asked:
    """One question being answered."""

    def __init__(self, plain: HopQAEpisode) -> None:
        self._task, self._left = plain.task, len(plain.task.relations) + 2
        self.messages: Sequence[Message] = [{"role": "user", "content": " ".join(plain.task.question)}]

    async def reply(self, action: Action) -> Reply:
        self._left -= 1
        said: Look | Answer | None = read_action([*action.content.split(), END]) if action.complete else None
        if isinstance(said, Answer):
            right = said.name == self._task.answer
            return Reply(done=True, reward=float(right), success=right)
        if self._left == 0:
            return Reply(done=True, reward=0.0, success=False, turn_limit=True)
        return Reply(messages=[{"role": "tool", "content": " ".join(self._task.reply(said)[1:-1])}])

    async def close(self) -> None: ...


def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The same, its time written down."""

    def called(*given: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*given)
        finally:
            SPENT[name].append(time.perf_counter() - began)

    return called


def make(tokenizer: Path | str, **options: Any) -> HopQAInMessages:
    return HopQAInMessages(tokenizer, **options)
