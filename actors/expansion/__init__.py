"""Which turns of a tree are branched at: the strategy that ``search.strategy`` names."""
