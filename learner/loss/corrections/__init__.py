"""The built-in corrections, ``correction.action``: one module each, whose function ``correction`` is it.

What is asked of one: ``learner.loss.protocols.Correction``.  A module here loads no torch when it is imported.
"""
