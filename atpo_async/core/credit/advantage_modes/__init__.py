"""A turn's advantage from the values of its tree: one module for each built-in ``credit.advantage_mode``, of that name.

Each has ``advantages(arrays, values, root_value) -> float64[N]``; the protocol is ``core.credit.rule.AdvantageMode``.
"""
