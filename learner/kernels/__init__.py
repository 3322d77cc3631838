"""Kernels of the learner: what replaces the transformers model's own operations, and numbers over the vocabulary."""
