"""Checkpoints: writing, reading, and what each holds."""
