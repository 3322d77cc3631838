"""The built-in surrogates, ``objective.surrogate``: one module each, whose function ``surrogate`` is it.

What is asked of one: ``learner.loss.protocols.Surrogate``.  A module here loads no torch when it is imported.
"""
