"""Weights out: publication, transport, probe."""
