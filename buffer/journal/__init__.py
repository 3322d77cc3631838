"""The journal: all that the buffer has acknowledged, on disk, and its recovery."""
