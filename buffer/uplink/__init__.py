"""What a joined learner passes to the run's folder: written there exactly once, in order, and nowhere else."""
