"""Links: asyncio ZeroMQ with windows, acknowledgements, heartbeats and CURVE keys.  This is the protocol's reference.

A ``Client`` (DEALER) and a ``Server`` (ROUTER) exchange two kinds of messages.

*Sends* are data that must not be lost.  The client numbers them.  It keeps each one until the server's handler has
returned, and until the effect of the handler is settled (made durable) where the server has something to settle; then
the server acknowledges it.  The server takes sends in order.  It drops a send that it has taken before, and it drops
what comes after a gap; the client then goes back and sends again from the first missing one.  A handler therefore sees
every message at least once and in order.  It sees a message twice only if the server was restarted in between, or if
the handler itself failed.

*Requests* have one reply each.  The client repeats a request that a lost connection may have swallowed.  The server
knows which requests it is working on and keeps its last replies, so that a repeated request is not run twice.  Requests
do not wait for sends: a request may overtake the sends before it.

A ``RoutedClient`` knows several servers on its way (``links.way``).  When the one that it uses falls silent it goes on
to the next, introduces itself there, and sends again what was not acknowledged.  A server that passes sends on to
another one, as a relay does, acknowledges each only once that one has (``links.parcels``).

An ``Announcer`` (PUB) publishes to every ``Listener`` (SUB) messages that may be missed.

Each message on a socket begins with a link frame, a fixed struct (``links.frames``).  The two frames of
``atpo_async.wire.codec`` follow where there is a message.  Nothing on a socket is pickled.  Off the loopback interface
every socket needs CURVE keys (``links.keys``).  With keys a peer is named after its key, ``gpu-7/actor-0``, and can
neither send in another peer's name nor receive what is addressed to it.

===================  ===================================================================================
module               what it holds
===================  ===================================================================================
``frames``           link frames and the size of messages
``client``           the client's end: window of sends, requests, waits
``server``           the server's end: sessions, sends, acknowledgements, requests, replies
``way``              the servers that lead up to the buffer, and which of them is in use
``parcels``          sends that are passed on
``announcements``    both ends of announcements
``link``             what all ends share; ``binding`` and ``connecting`` the two kinds of ends
``pump``             a ZeroMQ socket on the event loop
``authentication``   which peers may connect; ``keys`` the folders with keys
``addresses``        endpoints as text; ``ports`` which ports are free and which process uses them
===================  ===================================================================================
"""
