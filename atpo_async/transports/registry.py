"""Weight transports by name: ``weights.transport`` of a configuration as the transport it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from atpo_async.config import WeightsConfig
from atpo_async.config.doors import TRANSPORT
from atpo_async.core.calls import is_async
from atpo_async.core.errors import AtpoError, ConfigError, SetupError
from atpo_async.core.texts import of_error
from atpo_async.transports.base import Receiver, ReceiverContext, Sender, SenderContext, Transport
from atpo_async.transports.chain import Chain, auto
from atpo_async.transports.chunks import ChunkTransport

H = TypeVar("H")


def make_transport(settings: WeightsConfig) -> Transport:
    """The transport that a role uses.  Behind a user's own come chunks, for versions that it cannot bring.

    Raises ConfigError or SetupError naming ``weights.transport``.
    """
    if settings.transport == "auto":
        return auto()
    made: Transport = TRANSPORT.make(settings.transport, options=settings.transport_options)
    if settings.transport in TRANSPORT.names():
        return made
    return Chain({settings.transport: _Checked(made, settings.transport), "chunks": ChunkTransport(rarely=True)})


class _Checked:
    """A user's transport: what it returns as its halves is checked before it is used."""

    def __init__(self, transport: Transport, name: str) -> None:
        self._transport = transport
        self._name = name

    def sender(self, context: SenderContext) -> Sender:
        made = self._half(lambda: self._transport.sender(context), Sender)
        if is_async(made.offer):
            raise ConfigError(f"weights.transport = {self._name!r}: {type(made).__name__}.offer must not be async")
        return made

    def receiver(self, context: ReceiverContext) -> Receiver:
        made = self._half(lambda: self._transport.receiver(context), Receiver)
        if not is_async(made.fetch):
            raise ConfigError(f"weights.transport = {self._name!r}: {type(made).__name__}.fetch must be async")
        return made

    def _half(self, make: Callable[[], H], base: type[H]) -> H:
        try:
            made = make()
        except AtpoError:
            raise
        except Exception as exc:
            half = base.__name__.lower()
            raise SetupError(f"weights.transport = {self._name!r}: its {half}() failed: {of_error(exc)}") from exc
        if not isinstance(made, base):
            raise ConfigError(
                f"weights.transport = {self._name!r}: {base.__name__.lower()}() returned {type(made).__name__}, which "
                f"is no subclass of {base.__module__}.{base.__name__}"
            )
        return made
