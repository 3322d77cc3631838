"""Batches: requesting them from the buffer, checking their trees, recording the outcome."""
