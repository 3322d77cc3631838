"""Trees that are ready: their priorities, how a batch is drawn from them, what leaves and why."""
