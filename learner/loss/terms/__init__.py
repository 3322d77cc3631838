"""The built-in loss terms, ``objective.terms``: one module each, whose function ``term`` is it.

The protocol: ``learner.loss.protocols.Term``.  A module here loads no torch when it is imported.
"""
