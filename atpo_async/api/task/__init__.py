"""One task in the terminal: shown as messages, and played by hand, from a file or by a function."""
