"""Leases of trees to actors, the admission of new trees, evaluations."""
