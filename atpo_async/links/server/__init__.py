"""The server's end of a link.

``sessions`` holds the clients, ``sends`` takes their sends in order, ``acknowledgements`` acknowledges those that are
handled and settled, ``requests`` works on requests, ``replies`` and ``outbox`` bound what waits to be sent.
"""

from atpo_async.links.server.handling import Handler
from atpo_async.links.server.server import Server
from atpo_async.links.server.sessions import PeerInfo

__all__ = ["Handler", "PeerInfo", "Server"]
