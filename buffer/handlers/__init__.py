"""Requests of actors and of the learner: what each waits for, and when its answer may leave."""
