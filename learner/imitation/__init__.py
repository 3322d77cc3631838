"""Rows of earlier trees that are imitated beside a batch: which are fit, their weights, their loss."""
