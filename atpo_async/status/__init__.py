"""What a role says of itself, and what follows from it: waits, progress, hangs."""
