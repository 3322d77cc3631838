"""Environments: the protocol, the checks of what they return, and the built-in ones, by name."""
