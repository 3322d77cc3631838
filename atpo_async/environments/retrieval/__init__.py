"""Passages for queries: the protocol of the search tasks' retrieval servers, a client, a server, a BM25 index."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atpo_async.environments.retrieval.client import RetrievalClient as RetrievalClient
    from atpo_async.environments.retrieval.index import PassageIndex as PassageIndex
    from atpo_async.environments.retrieval.local import LocalRetriever as LocalRetriever
    from atpo_async.environments.retrieval.protocol import Passage as Passage
    from atpo_async.environments.retrieval.protocol import RetrievalFailed as RetrievalFailed
    from atpo_async.environments.retrieval.protocol import Retriever as Retriever

_MODULES = {
    "LocalRetriever": "local",
    "Passage": "protocol",
    "PassageIndex": "index",
    "RetrievalClient": "client",
    "RetrievalFailed": "protocol",
    "Retriever": "protocol",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
