"""Generation for a process that does nothing else meanwhile: all requests that wait are decoded together."""
