"""How one tree is grown: its chains and branches, and the calls of engine and environment for each turn."""
