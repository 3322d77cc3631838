"""The server's end of a link.

``sessions`` knows the clients, ``sends`` takes their sends in order, ``acknowledgements`` says when they are handled
and settled, ``requests`` works on requests, ``replies`` and ``outbox`` bound what waits on the way out.
"""

from atpo_async.links.server.handling import Handler
from atpo_async.links.server.server import Server
from atpo_async.links.server.sessions import PeerInfo

__all__ = ["Handler", "PeerInfo", "Server"]
