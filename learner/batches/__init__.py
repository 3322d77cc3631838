"""Batches in: asking the buffer, checking trees, recording what came of them."""
