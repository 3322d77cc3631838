"""Actors: lease a task, grow its turn tree, stream every finished turn; take weights up while generating."""
