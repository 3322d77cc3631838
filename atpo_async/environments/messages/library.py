"""The library `renderers`: its import, its renderers by name with their options, and their tokenizer."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.texts import of_error, shortened
from atpo_async.environments.messages.types import Message, ToolSchema

__all__ = [
    "FastTokenizer",
    "Kept",
    "RendererLike",
    "TokenIds",
    "configured",
    "key_of",
    "library",
    "load_tokenizer",
    "made",
    "names",
]

SHORT_TEXT, SHORT_TEXTS = 64, 4096
"""Texts of at most so many characters are encoded once; so many of them."""

TEMPLATE = "default"
"""The library's name for a renderer over the tokenizer's own Jinja template."""

HARMONY = "gpt-oss"
"""The one renderer whose library loads a vocabulary of its own when it is made."""

_VOCABULARY = (
    "the library openai-harmony downloads its vocabulary: without a network put o200k_base.tiktoken into a folder and "
    "set TIKTOKEN_ENCODINGS_BASE to it"
)

T = TypeVar("T")

_IMPORTING = threading.Lock()


class TokenIds(Protocol):
    """Of the library's ``RenderedTokens``, all that is read here."""

    @property
    def token_ids(self) -> list[int]: ...


class RendererLike(Protocol):
    """What ``ChatFormat`` needs of a renderer; a part of the library's own protocol."""

    def render_ids(
        self, messages: list[Message], *, tools: list[ToolSchema] | None = None, add_generation_prompt: bool = False
    ) -> list[int]: ...

    def parse_response(
        self, token_ids: list[int], *, tools: list[ToolSchema] | None = None, prompt_ids: list[int] | None = None
    ) -> Any: ...

    def get_stop_token_ids(self) -> list[int]: ...

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: list[int],
        previous_completion_ids: list[int],
        new_messages: list[Message],
        *,
        tools: list[ToolSchema] | None = None,
    ) -> TokenIds | None: ...


def library() -> ModuleType:
    """``renderers.base`` with every renderer registered.  Raises SetupError where it cannot be imported."""
    with _IMPORTING:
        try:
            base = importlib.import_module("renderers.base")
            base._populate_registry()
        except ImportError as exc:
            raise SetupError(
                f"the library renderers cannot be imported: {of_error(exc)}; reinstall atpo-async"
            ) from exc
    return base


def names() -> tuple[str, ...]:
    """Every renderer that may be asked for by name."""
    return tuple(library().RENDERER_REGISTRY)


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean …?``, or nothing."""
    found = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def configured(name: str, options: Mapping[str, Any]) -> Any:
    """The library's configuration of one renderer.

    A conversation goes on from what was sampled, so that earlier thinking stays: ``thinking_retention`` is ``all``
    unless ``options`` say otherwise.

    Raises:
        ConfigError: no such renderer, no such option, or a value that it cannot have.
    """
    if name not in names():
        hint = nearest(name, names())
        raise ConfigError(f"renderer = {name!r} is not known{hint}; known: auto, {', '.join(sorted(names()))}")
    configs = importlib.import_module("renderers.configs")
    kind = configs._CONFIG_BY_NAME[name]
    known = sorted(set(kind.model_fields) - {"name"})
    unknown = sorted(set(options) - set(known))
    if unknown and name != TEMPLATE:
        hint = nearest(unknown[0], known)
        raise ConfigError(f"renderer {name!r} has no option {unknown[0]!r}{hint}; it has {', '.join(known)}")
    kept = {} if name == TEMPLATE else {"thinking_retention": "all"}
    try:
        return kind(**(kept | dict(options)))
    except ValueError as exc:
        said = shortened(" ".join(str(exc).split("\n")[1:]) or str(exc))
        shown = ", ".join(f"{key} = {value!r}" for key, value in options.items())
        raise ConfigError(
            f"renderer {name!r} does not take {shown}: {said}. A conversation is extended with what was sampled, so "
            "that earlier thinking has to stay (thinking_retention = 'all')"
        ) from exc


def made(tokenizer: FastTokenizer, name: str, options: Mapping[str, Any]) -> RendererLike:
    """One of the library's renderers.  Never asks the Hub anything.  Raises ConfigError."""
    config = configured(name, options)
    try:
        renderer: RendererLike = library().RENDERER_REGISTRY[name](tokenizer, config)
    except Exception as exc:
        hint = _VOCABULARY if name == HARMONY else (
            "it is for another family of models, or the folder's tokenizer.json is not the model's"
        )  # fmt: skip
        raise ConfigError(
            f"renderer {name!r} cannot be used with the tokenizer of {tokenizer.name_or_path}: {of_error(exc)}; {hint}"
        ) from exc
    return renderer


class Kept(Generic[T]):
    """The values of the latest keys.  Several threads may use one.

    Args:
        most: so many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: dict[str, T] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> T | None:
        with self._lock:
            value = self._values.pop(key, None)
            if value is not None:
                self._values[key] = value  # the latest is the last to go
            return value

    def put(self, key: str, value: T) -> None:
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._most:
                del self._values[next(iter(self._values))]


def key_of(messages: Sequence[Message]) -> str:
    """What tells messages from others; empty where keys of a task's own, for its chat template, are no JSON."""
    try:
        return json.dumps(messages, ensure_ascii=False)
    except (TypeError, ValueError):
        return ""


class FastTokenizer:
    """A tokenizer as the library's renderers use it, without what they ask of it only to attribute tokens to messages.

    Args:
        plain: of transformers.  A fast one is asked directly.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self._backend = getattr(plain, "backend_tokenizer", None)
        self._short: dict[str, tuple[int, ...]] = {}
        self._ids: dict[str, Any] = {}
        self.all_special_tokens: list[str] = list(plain.all_special_tokens)
        self.name_or_path: str = plain.name_or_path
        self.unk_token_id: int | None = plain.unk_token_id
        self.eos_token_id: int | None = plain.eos_token_id

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # no __call__: the library would ask for offsets with every text
            raise AttributeError(name)
        return getattr(self.plain, name)

    def encode(self, text: str, *args: object, add_special_tokens: bool = False, **kwargs: object) -> list[int]:
        """Ids of a text, without a beginning or an end of its own."""
        if len(text) > SHORT_TEXT:
            return self._encoded(text)
        found = self._short.get(text)
        if found is None:
            found = tuple(self._encoded(text))
            if len(self._short) < SHORT_TEXTS:
                self._short[text] = found
        return list(found)

    def _encoded(self, text: str) -> list[int]:
        if self._backend is None:
            return list(self.plain.encode(text, add_special_tokens=False))
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and the character after each one's last.  Slow tokenizers have no offsets: all end at the end."""
        if self._backend is None:
            ids = self._encoded(text)
            return ids, [len(text)] * len(ids)
        coded = self._backend.encode(text, add_special_tokens=False)
        return list(coded.ids), [end for _, end in coded.offsets]

    def decode(self, token_ids: Any, *args: object, **kwargs: object) -> str:
        """Text of ids, special tokens included; an id that the tokenizer does not know has none."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if self._backend is None:
            return str(self.plain.decode(ids, skip_special_tokens=False))
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """As the tokenizer's; the library asks for the same few with every action."""
        if not isinstance(tokens, str):
            return self.plain.convert_tokens_to_ids(tokens)
        if tokens not in self._ids:
            self._ids[tokens] = self.plain.convert_tokens_to_ids(tokens)
        return self._ids[tokens]

    def added_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that no other text is merged with."""
        added = dict(self.plain.get_added_vocab())
        if self.plain.eos_token is not None and self.eos_token_id is not None:
            added.setdefault(str(self.plain.eos_token), self.eos_token_id)
        return added


def load_tokenizer(folder: str | Path) -> FastTokenizer:
    """The tokenizer of a model folder, from this machine alone.  Raises SetupError."""
    path = Path(folder)
    if not path.is_dir():
        raise SetupError(f"tokenizer {path}: there is no such folder; expected the policy's model folder")
    from transformers import AutoTokenizer

    try:
        plain = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as exc:
        raise SetupError(f"the tokenizer in {path} cannot be loaded: {of_error(exc)}") from exc
    return FastTokenizer(plain)


def end_ids(folder: str | Path) -> list[int]:
    """``eos_token_id`` of a folder's generation_config.json: one, several or none."""
    try:
        said = json.loads((Path(folder) / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    found: Sequence[Any] = said if isinstance(said, list) else [said]
    return [i for i in found if isinstance(i, int) and not isinstance(i, bool)]
