"""What ``@tool`` makes of a function: schema, check of arguments, refusals at once, and what an answer may be."""

from __future__ import annotations

import asyncio
import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from typing_extensions import TypedDict

from atpo_async.core.errors import ConfigError
from atpo_async.environments import Info, Row, tool
from atpo_async.environments.tools.arguments import ArgumentsRefused
from atpo_async.environments.tools.docstrings import described
from atpo_async.environments.tools.faults import ToolFailed
from atpo_async.environments.tools.output import NOTICE, shown, text_of
from atpo_async.environments.tools.tool import MAX_TOKENS, Tool, as_tools


@dataclass
class Box:
    width: int
    height: float = 1.0


class Place(TypedDict):
    city: str


@tool
def lookup(relation: str, name: str) -> str:
    "Look one fact up."
    return f"{relation} of {name}"


def every_kind(
    text: str,
    count: int,
    share: float,
    deep: bool,
    kind: Literal["a", "b"],
    names: list[str],
    more: dict[str, int],
    box: Box,
    place: Place,
    maybe: str | None = None,
    told: Annotated[int, "how often"] = 3,
) -> str:
    return repr((text, count, share, deep, kind, names, more, box, place, maybe, told))


def test_a_bare_tool_has_name_description_and_a_schema_of_its_parameters() -> None:
    assert lookup.schema == {
        "name": "lookup",
        "description": "Look one fact up.",
        "parameters": {
            "type": "object",
            "properties": {"relation": {"type": "string"}, "name": {"type": "string"}},
            "required": ["relation", "name"],
        },
    }
    assert lookup("capital", "France") == "capital of France"
    assert (lookup.read_only, lookup.timeout_s, lookup.max_tokens) == (False, None, MAX_TOKENS)


def test_options_are_given_by_keyword() -> None:
    made = tool(name="look-up", description="Looks.", read_only=True, timeout_s=2, max_tokens=9)(lookup.function)
    assert (made.name, made.schema["name"], made.schema["description"]) == ("look-up", "look-up", "Looks.")
    assert (made.read_only, made.timeout_s, made.max_tokens) == (True, 2, 9)


def test_the_schema_has_the_types_of_all_annotations() -> None:
    parameters = tool(every_kind).schema["parameters"]
    types = {name: one.get("type") for name, one in parameters["properties"].items()}
    assert types == {
        "text": "string",
        "count": "integer",
        "share": "number",
        "deep": "boolean",
        "kind": "string",
        "names": "array",
        "more": "object",
        "box": None,
        "place": None,
        "maybe": None,
        "told": "integer",
    }
    assert parameters["properties"]["kind"]["enum"] == ["a", "b"]
    assert parameters["properties"]["told"] == {"type": "integer", "default": 3}
    assert parameters["$defs"]["Box"]["properties"]["width"] == {"type": "integer"}
    assert parameters["required"] == list(types)[:9]
    assert "title" not in str(parameters)


GOOGLE = """Finds
    things.

    At length.

    Args:
        query: what is asked,
            in words.
        limit (int): how many: at most.

    Returns:
        str: a list.
    """
NUMPY = """Finds things.

    Parameters
    ----------
    query : str
        what is asked,
        in words.
    limit : int, optional
        how many: at most.

    Returns
    -------
    str
        a list.
    """


@pytest.mark.parametrize("text", [GOOGLE, NUMPY])
def test_the_docstring_describes_the_tool_and_its_arguments(text: str) -> None:
    def find(query: str, limit: int = 3) -> None: ...

    find.__doc__ = text
    properties = tool(find).schema["parameters"]["properties"]
    assert tool(find).schema["description"] == "Finds things."
    assert properties["query"]["description"] == "what is asked, in words."
    assert properties["limit"] == {"type": "integer", "default": 3, "description": "how many: at most."}


def test_a_docstring_without_a_summary_or_without_arguments_describes_nothing() -> None:
    def only_arguments() -> None:
        """
        Args:
            x: it.
        """

    assert described(only_arguments) == ("", {"x": "it."})
    assert described(lambda: None) == ("", {})


def test_parameters_that_pydantic_has_other_uses_for_are_only_names() -> None:
    @tool
    def odd(schema: str, json: str, model_config: int, copy: bool, title: str) -> None: ...

    given = {"schema": "s", "json": "j", "model_config": 1, "copy": True, "title": "t"}
    assert odd.arguments.read(given) == given
    assert odd.schema["parameters"]["properties"]["title"] == {"type": "string"}


# --- arguments of a call -----------------------------------------------------------------------------------------

GIVEN = {
    "text": 2024,
    "count": "7",
    "share": 1,
    "deep": True,
    "kind": "b",
    "names": ["x"],
    "more": {"x": 1},
    "box": {"width": 2},
    "place": {"city": "Rome"},
}


def test_arguments_are_converted_where_nothing_is_lost_and_defaults_are_left_to_the_function() -> None:
    found = tool(every_kind).arguments.read(GIVEN)
    assert found == {**GIVEN, "text": "2024", "count": 7, "share": 1.0, "box": Box(2)}
    assert every_kind(**found).endswith("None, 3)")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"relation": "x"}, "argument 'name' is missing"),
        ({"relation": "x", "name": "y", "nam": "z"}, "there is no argument 'nam' (arguments: relation, name)"),
        ({"relation": ["x"], "name": "y"}, "argument 'relation': Input should be a valid string"),
        ({"relation": None, "name": "y"}, "argument 'relation': Input should be a valid string"),
        ({}, "argument 'relation' is missing; argument 'name' is missing"),
    ],
)
def test_arguments_that_do_not_fit_are_told_to_the_policy(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentsRefused) as caught:
        lookup.arguments.read(arguments)
    assert str(caught.value) == told


def test_what_the_policy_is_told_of_a_wild_call_is_short() -> None:
    with pytest.raises(ArgumentsRefused) as caught:
        lookup.arguments.read({f"x{i}" * 1000: i for i in range(1000)})
    assert len(str(caught.value)) < 400


def test_info_and_row_are_given_by_the_episode_and_no_policy_sees_them() -> None:
    @tool
    def count(word: str, info: Info, task: Row) -> None: ...

    assert list(count.schema["parameters"]["properties"]) == ["word"]
    assert count.arguments.given == {"info": Info, "task": Row}
    with pytest.raises(ArgumentsRefused, match="no argument 'info'"):
        count.arguments.read({"word": "x", "info": {}})


# --- what is refused at once -------------------------------------------------------------------------------------


def no_annotation(relation, name: str) -> None: ...  # type: ignore[no-untyped-def]
def with_default(limit=3) -> None: ...  # type: ignore[no-untyped-def]
def any_number(*names: str) -> None: ...
def a_method(self, x: str) -> None: ...  # type: ignore[no-untyped-def]
def unreadable(x: Unheard) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def no_json(x: asyncio.Event) -> None: ...
def wants_info(word: str, info: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("function", "options", "told"),
    [
        (no_annotation, {}, "tool 'no_annotation': parameter 'relation' has no annotation, .* write relation: str"),
        (with_default, {}, "tool 'with_default': parameter 'limit' has no annotation"),
        (any_number, {}, "tool 'any_number': .* write the parameters out"),
        (a_method, {}, r"tool 'a_method' is a method: .*tools=\[tool\(thing.method\)\]"),
        (unreadable, {}, "tool 'unreadable': its annotations cannot be read: NameError: name 'Unheard'"),
        (no_json, {}, "tool 'no_json': an annotation cannot be expressed as a JSON schema .*use str, int"),
        (wants_info, {}, "tool 'wants_info': .* write info: Info"),
        (lambda x: x, {}, "name is a lambda; .* write a function with def"),
        (lookup.function, {"name": "look up"}, "name is 'look up'; expected letters, digits"),
        (lookup.function, {"timeout": 3}, "@tool of 'lookup' has no option 'timeout'; options: .*timeout_s"),
        (lookup.function, {"timeout_s": 0}, "tool 'lookup': timeout_s is 0; expected a number above 0"),
        (lookup.function, {"max_tokens": "9"}, "tool 'lookup': max_tokens is '9'"),
        (lookup.function, {"on_error": "raise"}, "on_error is 'raise'; expected 'fail' or 'answer'"),
        (lookup.function, {"read_only": "yes"}, "read_only is 'yes'; expected True or False"),
        (3, {}, r"@tool was given 3 \(int\), which is no function"),
    ],
)
def test_a_function_that_is_no_tool_is_refused_at_once(function: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tool(**options)(function)


def test_a_tool_that_only_reads_cannot_fill_the_episodes_info() -> None:
    def remember(word: str, info: Info) -> None: ...

    with pytest.raises(ConfigError, match="tool 'remember': read_only=True, but it takes the episode's Info"):
        tool(read_only=True)(remember)


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        ([lookup, lookup], "two tools are called 'lookup'; give one another name"),
        (lookup, r"tools is <tool lookup> \(Tool\); expected a list of functions: tools=\[lookup\]"),
        ("lookup", "tools is 'lookup'"),
        (["lookup"], r"tools\[0\] is 'lookup' \(str\).*leave the \(\) away"),
        ([Tool], r"tools\[0\] is .* expected a function with @tool"),
    ],
)
def test_a_list_of_tools_that_is_none_is_refused(tools: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        as_tools(tools)


def test_plain_functions_bound_methods_and_no_tools_at_all_are_fine() -> None:
    class Shop:
        def price(self, item: str) -> float:
            return float(len(item))

    made = as_tools(
        [lookup.function, Shop().price, tool(name="of_rome")(functools.partial(lookup.function, name="Rome"))]
    )
    assert [one.name for one in made] == ["lookup", "price", "of_rome"]
    assert as_tools([]) == ()


# --- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        ("", ""),
        (7, "7"),
        (True, "true"),
        (0.5, "0.5"),
        ({"é": [1, None]}, '{"é": [1, null]}'),
        ([np.int64(3), np.float32(0.5)], "[3, 0.5]"),
        (np.arange(3), "[0, 1, 2]"),
        (math.inf, "Infinity"),
        ("half \ud800", "half ?"),
    ],
)
def test_texts_are_shown_as_they_are_and_plain_values_as_json(value: Any, text: str) -> None:
    assert text_of(value, "lookup") == text


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, r"tool 'lookup' returned None \(NoneType\); expected a str, .*return '' for an empty answer"),
        (b"abc", r"returned b'abc' \(bytes\); .*return data.decode\(\)"),
        (object(), r"returned <object .*\(object\); expected a str"),
        ([{1}], r"\(list\): it holds set; expected"),
        (iter([]), "list_iterator"),
    ],
)
def test_anything_else_fails_and_names_the_tool_the_type_and_the_way_out(value: Any, told: str) -> None:
    with pytest.raises(ToolFailed, match=told) as caught:
        text_of(value, "lookup")
    assert caught.value.kind == "value of tool 'lookup'"


def test_a_long_answer_is_cut_with_a_notice_and_what_lies_far_behind_is_not_looked_at() -> None:
    seen: list[int] = []

    def cut(text: str, most: int, notice: str) -> str:
        """A token a character."""
        seen.append(len(text))
        return text if len(text) <= most else text[: most - len(notice)] + notice

    text, was_cut = shown("x" * 5_000_000, 100, cut)
    assert (len(text), was_cut, text.endswith(NOTICE)) == (100, True, True)
    assert seen == [1600]
    assert shown("short", 100, cut) == ("short", False)
    assert shown("x" * 80, 100, cut) == ("x" * 80, False)


def test_a_long_answer_of_few_tokens_has_the_notice_as_well() -> None:
    text, was_cut = shown("x" * 2000, 100, lambda text, most, notice: text)
    assert (text, was_cut) == ("x" * 1600 + NOTICE, True)
