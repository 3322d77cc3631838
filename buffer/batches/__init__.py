"""What the learner is given: when there is a batch, which trees are in it, and what became of it."""
