"""The replay pool of ready trees: their priorities, how a batch is drawn from them, which leave it and why."""
