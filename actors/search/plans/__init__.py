"""Plans of a tree's growth: which chains begin, and when."""
