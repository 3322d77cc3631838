"""How one tree is grown: its chains and branches, and the engine's and environment's calls that each turn takes."""
