"""A learner that joins a run by address: how it is let in, and how what it writes gets into the run's folder."""
