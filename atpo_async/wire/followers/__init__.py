"""What a buffer and the followers of its journal say to one another."""
