"""Passages for queries: the protocol of the search tasks' retrieval servers, a client, a server, a BM25 index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.lazily import loaded_from

if TYPE_CHECKING:
    from atpo_async.environments.retrieval.client import RetrievalClient as RetrievalClient
    from atpo_async.environments.retrieval.index import PassageIndex as PassageIndex
    from atpo_async.environments.retrieval.local import LocalRetriever as LocalRetriever
    from atpo_async.environments.retrieval.protocol import Passage as Passage
    from atpo_async.environments.retrieval.protocol import RetrievalFailed as RetrievalFailed
    from atpo_async.environments.retrieval.protocol import Retriever as Retriever

_MODULES = {
    "LocalRetriever": "atpo_async.environments.retrieval.local",
    "Passage": "atpo_async.environments.retrieval.protocol",
    "PassageIndex": "atpo_async.environments.retrieval.index",
    "RetrievalClient": "atpo_async.environments.retrieval.client",
    "RetrievalFailed": "atpo_async.environments.retrieval.protocol",
    "Retriever": "atpo_async.environments.retrieval.protocol",
}

__getattr__ = loaded_from(_MODULES, package=__name__)
