"""How a turn's value follows from its children's: one module for each built-in ``credit.value_mode``, of that name.

Each has ``values(arrays, ratio) -> (float64[N], V(root))``; the protocol is ``core.credit.rule.ValueMode``.
"""
