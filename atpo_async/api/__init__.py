"""The Python door: train, evaluate, open a run; the command line is a layer on it."""
