"""The loss: surrogate, correction for stale data, guards."""
