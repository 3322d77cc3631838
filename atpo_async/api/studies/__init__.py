"""Studies: the cells that are still to be run, and what follows from their results."""
