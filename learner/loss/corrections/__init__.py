"""The built-in corrections, ``correction.action``: one module each, whose function ``correction`` is it.

The protocol: ``learner.loss.protocols.Correction``.  A module here loads no torch when it is imported.
"""
