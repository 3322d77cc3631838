"""The built-in rules of ``search.expand = "online"``: one module each, of the name that ``search.strategy`` has for it.

Each has ``decide(tree, turn_id, count, rng, settings) -> ids``; the protocol is ``actors.expansion.expansion.Rule``.
"""
