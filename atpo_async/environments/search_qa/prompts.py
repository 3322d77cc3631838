r"""What the policy is told before a question.

Tags, rules and their order are the published ones; the words are ours.  Published data carry their own prompt in the
column ``prompt``, which is used as it is; ``instructions`` names a file with other words, in which ``{question}``
stands where the question goes.
"""

from __future__ import annotations

from pathlib import Path

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.texts import of_error
from atpo_async.environments.messages.types import Message
from atpo_async.environments.search_qa.dialects import Dialect

PLACE = "{question}"

AT2PO = r"""You are an assistant that answers a question step by step and may look facts up in Wikipedia with a search tool. First reason about the question, then answer it. While you reason, call the search tool whenever you need a fact about a particular subject; there is no limit to how often you may ask for one. Put your reasoning between <think> and </think> and your answer between <answer> and </answer>. Put each query between <search> and </search>; what was found is given to you between <result> and </result>. An example of the form: <think> reasoning </think> <search> a query </search> <result> what was found </result> <think> reasoning </think> <answer> The final answer is \[ \boxed{the answer} \] </answer>. At the end of the answer, put the exact final answer alone into \boxed{}.
user
{question}"""  # noqa: E501

SEARCH_R1 = """Answer the question below. Whenever you get new information, first reason about it between <think> and </think>. If you then find that a fact is missing, call a search engine with <search> query </search>; the best results are given to you between <information> and </information>. You may search as often as you like. Once nothing is missing any more, give the answer alone between <answer> and </answer>, without an explanation. For example: <answer> Beijing </answer>. Question: {question}
"""  # noqa: E501

INSTRUCTIONS = {"at2po": AT2PO, "search_r1": SEARCH_R1}


def read_instructions(file: str, dialect: Dialect) -> str:
    """The text of a file, or the dialect's own where none is named.

    Raises:
        SetupError: the file cannot be read.
        ConfigError: it has no place for the question, or more than one.
    """
    if not file:
        return INSTRUCTIONS[dialect.name]
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise SetupError(f"environment.options.instructions = {file!r} cannot be read: {of_error(exc)}") from exc
    if text.count(PLACE) != 1:
        raise ConfigError(
            f"environment.options.instructions = {file!r} has {PLACE} {text.count(PLACE)} times; it must stand once, "
            "where the question goes"
        )
    return text


def messages_of(question: str, instructions: str, dialect: Dialect) -> list[Message]:
    """One message: of the system in AT2PO's dialect, of the user in Search-R1's."""
    return [{"role": dialect.prompt_role, "content": instructions.replace(PLACE, asked(question))}]


def asked(question: str) -> str:
    """Without blanks around it, and with a question mark at its end, as in both data sets."""
    text = question.strip()
    return text if text.endswith("?") else f"{text}?"
