"""Weights in: fetched, verified, and taken up by the engine."""
