"""The command line, ``atpo``."""
