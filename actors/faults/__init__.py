"""Faults of environments, strategies and engines: counted, reported, and when they end the run."""
