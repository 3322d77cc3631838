"""A relay: a process between far actors and the buffer.  It fetches each version once, and passes on what actors say.

``relay`` puts the parts together, ``uplink`` joins the run, ``passages`` pass on what actors and buffer say to each
other, ``weights`` serves the versions that ``versions`` and ``differences`` hold, and ``process`` is the command's
process.  docs/relays.md is for users.
"""
