"""A replica of a run's folder, in which a learner works that joined by address, and what it passes on from there."""
