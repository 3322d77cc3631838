"""What the buffer keeps on disk."""
