"""Trees to token batches, and attention over packed trees."""
