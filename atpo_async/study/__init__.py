"""A staleness study: its grid, its runs, its results and its report."""
