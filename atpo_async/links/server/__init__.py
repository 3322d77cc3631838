"""The server's end of a link: sessions of clients, their sends in order, their requests, and the replies."""

from atpo_async.links.server.server import Handler, Server
from atpo_async.links.server.sessions import PeerInfo

__all__ = ["Handler", "PeerInfo", "Server"]
