"""Packing of trees into token batches, and attention over packed trees."""
