"""Batches for the learner: when one is served, which trees are in it, and whether it was trained on."""
