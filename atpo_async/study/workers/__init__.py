"""Processes that run the cells of a study and stay from one to the next."""
