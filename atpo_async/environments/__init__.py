"""Environments: the protocol, the checks of what they hand over, and the built-in ones, by name."""
