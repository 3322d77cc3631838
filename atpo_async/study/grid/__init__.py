"""What a study runs: its axes and their values, and the grids that come with a name."""
