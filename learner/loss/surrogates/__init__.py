"""The built-in surrogates, ``objective.surrogate``: one module each, whose function ``surrogate`` is it.

The protocol: ``learner.loss.protocols.Surrogate``.  A module here loads no torch when it is imported.
"""
