"""The built-in token weights, ``objective.token_weights``: one module each, whose function ``weight`` is it.

The protocol: ``learner.loss.protocols.TokenWeight``.  A module here loads no torch when it is imported.
"""
