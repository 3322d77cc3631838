"""Who grows which tree: leases, admission of new trees, evaluations."""
