"""The Python interface: train, evaluate, open a run; the command line is a layer on it."""
