"""Environments: the protocol and the built-in ones, by name."""
