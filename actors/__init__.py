"""Actors: lease a task, grow its turn tree, stream every finished turn; load new weights while generating."""
