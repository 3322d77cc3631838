"""The journal: everything that the buffer has acknowledged, on disk, and its recovery."""
