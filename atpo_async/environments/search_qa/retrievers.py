"""The search engine of a run: a retrieval server, or an index in this process; asked once before the run begins."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.texts import of_error, of_value
from atpo_async.environments.data.faults import missing_file

if TYPE_CHECKING:
    from atpo_async.environments.retrieval import Retriever

LOCAL, HTTP = "local:", ("http://", "https://")
FILES, ENDINGS = ("data", "eval_data", "held_out", "instructions"), (".jsonl", ".json", ".parquet", ".gz", ".txt")
PROBE = "capital of France"
PROBE_S = 5.0
"""How long a server has for its first answer."""

_answered: set[str] = set()
"""URLs that have answered in this process: a server that goes down later costs branches, and no environment that is
made anew on another loop."""


def open_retriever(name: object, *, topk: int, probe_s: float = PROBE_S) -> Retriever:
    """The retriever that ``environment.options.retriever`` names.

    Args:
        name: ``http://host:port/retrieve``, or ``local:CORPUS.jsonl`` for a BM25 index of a corpus in this process.
        topk: passages for a query.
        probe_s: how long a server has for its first answer.

    Raises:
        ConfigError: it is neither.
        SetupError: the server does not answer as a retrieval server does, or the corpus cannot be read.
    """
    if isinstance(name, str) and name.startswith(LOCAL) and len(name) > len(LOCAL):
        return _local(name.removeprefix(LOCAL), topk)
    if isinstance(name, str) and name.startswith(HTTP):
        from atpo_async.environments.retrieval import RetrievalClient

        client = RetrievalClient(name, topk=topk)
        ask_once(client.url, topk=topk, limit_s=probe_s)
        return client
    raise ConfigError(
        f"environment.options.retriever is {of_value(name)}; expected the URL of a retrieval server, such as "
        "'http://127.0.0.1:8000/retrieve', or 'local:CORPUS.jsonl'; `atpo retriever CORPUS.jsonl` starts a server"
    )


def check_needs(options: Mapping[str, Any]) -> None:
    """What a run with these ``environment.options`` needs outside itself: files of questions, words and passages, a
    server that answers.  Raises SetupError naming all that is missing; loads nothing."""
    faults = [fault for name in FILES if (fault := _file_fault(name, options.get(name))) is not None]
    name = options.get("retriever", "")
    try:
        if isinstance(name, str) and name.startswith(LOCAL):
            _check_corpus(name.removeprefix(LOCAL))
        elif isinstance(name, str) and name.startswith(HTTP):
            ask_once(served_at(name), topk=1)
        else:
            open_retriever(name, topk=1)
    except (ConfigError, SetupError) as exc:
        faults.append(str(exc))
    if faults:
        raise SetupError("; ".join(faults))


def _file_fault(name: str, value: object) -> str | None:
    """A data set of the Hub, a pattern or a list is left to the environment."""
    if not isinstance(value, str) or not value.endswith(ENDINGS) or "*" in value or Path(value).exists():
        return None
    return f"environment.options.{name} = {value!r}: {missing_file(value)}"


def served_at(url: str) -> str:
    """As the client reads a URL: its path may be left out.  Raises ConfigError."""
    from atpo_async.environments.retrieval.posting import checked_url

    return checked_url(url)


def _local(corpus: str, topk: int) -> Retriever:
    from atpo_async.environments.retrieval import LocalRetriever

    _check_corpus(corpus)
    return LocalRetriever(corpus, topk=topk)


def _check_corpus(corpus: str) -> None:
    """Raises SetupError where there is no such file."""
    if not Path(corpus).is_file():
        raise SetupError(
            f"environment.options.retriever = 'local:{corpus}': there is no file {corpus}; it must be a corpus as JSON "
            'lines, {"id": …, "contents": "\\"title\\"\\ntext"} each'
        )


def ask_once(url: str, *, topk: int, limit_s: float = PROBE_S) -> None:
    """Raises SetupError where the server at ``url`` does not answer a query within ``limit_s``."""
    if url in _answered:
        return
    way_out = "start it (`atpo retriever CORPUS.jsonl --port …`, or the retrieval server of Search-R1), or name another"
    label = f"the retrieval server {url} (environment.options.retriever)"
    body = json.dumps({"queries": [PROBE], "topk": topk, "return_scores": True}).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    began = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=limit_s) as answer:
            said = json.loads(answer.read())
        result = said["result"]
        if not isinstance(result, list) or len(result) != 1:
            raise ValueError(f"result is {of_value(result)}")
    except urllib.error.HTTPError as exc:
        raise SetupError(f"{label} answers with HTTP {exc.code} {exc.reason}; check the path, or {way_out}") from exc
    except (OSError, ValueError, KeyError, TypeError) as exc:
        if isinstance(exc, OSError):
            reason = getattr(exc, "reason", exc)
            waited = f" after {time.monotonic() - began:.0f} s"
            raise SetupError(f"{label} does not answer{waited}: {of_error(_error(reason))}; {way_out}") from exc
        raise SetupError(
            f"{label} answers, and not as a retrieval server does ({of_error(exc)}); expected "
            f'{{"result": [[{{"document": {{"contents": …}}, "score": …}}, …]]}}; {way_out}'
        ) from exc
    _answered.add(url)


def _error(reason: object) -> BaseException:
    return reason if isinstance(reason, BaseException) else OSError(str(reason))
