"""The built-in expansion strategies: one module each, of the name that ``search.strategy`` has for it.

Each has ``select(tree, count, rng, settings) -> turn ids``; the protocol is ``actors.expansion.expansion.Strategy``.
"""
