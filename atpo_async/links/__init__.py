"""asyncio ZeroMQ: windows, acknowledgements, heartbeats, CURVE.

``Client`` (DEALER) and ``Server`` (ROUTER) carry two kinds of traffic.

*Sends* are data that must not be lost.  The client numbers them and keeps each until the server's handler is done
with it, and until what the handler did is settled, where the server has something to settle.  The server takes them in
order: what it has taken before it drops, what comes after a gap it drops too, and the client goes back and sends again
from the first one missing.  A handler therefore sees every message at least once, in order, and more than once only
across a restart of the server or when the handler itself failed.

*Requests* have one reply each.  The client repeats those that a lost connection may have swallowed; the server
remembers which it is working on and its last replies, so that a repeated request is not run twice.  Requests do not
wait for sends: a request may overtake the sends before it.

``Announcer`` and ``Listener`` (PUB, SUB) carry what may be missed.

Link frames (before the two frames of ``atpo_async.wire.codec``, where there are any) are fixed structs.  Nothing on a
socket is pickled.  Off the loopback interface every socket needs CURVE keys (``links.keys``); with keys a peer is
who its key says, ``gpu-7/actor-0``, and can neither speak nor listen for another.

``common`` is what both ends agree on, ``sockets`` the sockets, ``client``, ``server`` and ``announcements`` the ends.
"""
